"""Pairs become tensors: Wan's own conventions, every sample once, the same bytes each time."""

import contextlib
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from components.clips.archive import open_clip, read_clips, read_tar, write_tar
from components.latents import encoders
from components.latents.encode_latents import code_facts
from components.latents.encoders import Encoders, load_text_encoder, load_vae
from components.pipeline.processes import make_parts
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.prompts.tokens import load_tokenizer
from components.settings.profile import read_sections
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
from univigu.video import encode_mp4

STEP = "encode-latents"


@pytest.fixture
def encoded(digits_root, profile, recommit):
    """A work root with its 12 pairs encoded, the pairs, and the rows of the latents table by id."""
    root, clips, _ = digits_root
    pairs = [
        {
            **{key: clip[key] for key in ("stage", "prompt", "shard", "member")},
            "id": f"s{clip['id']}",
            "clip_id": clip["id"],
            "split": "heldout" if number == 5 else "train",
            "caption": None if clip["stage"] == 1 else f"{clip['prompt']} and nothing else is in the frame",
        }
        for number, clip in enumerate(clips)
    ]
    recommit(root, "validate-pairs", {"pairs": pairs})
    run_stage(STEP, profile, root)
    return root, pairs, {row["id"]: row for row in read_table(root / "data/latents", "latents").to_pylist()}


def sample(root, row, profile):
    home = root / "data/latents"
    refs = [SampleRef(row["id"], home / row["shard"], row["row"])]
    return LatentDataset(refs, home / EMPTY_PROMPT, profile["text"]["prompt_length"]).batch([0], [0])


def test_every_pair_has_its_row_and_its_digests(encoded, digits_root):
    _, pairs, rows = encoded
    clips = {clip["id"]: clip for clip in digits_root[1]}
    assert set(rows) == {pair["id"] for pair in pairs}
    for pair in pairs:
        row = rows[pair["id"]]
        assert (row["stage"], row["split"]) == (pair["stage"], pair["split"])
        assert row["video_sha256"] == clips[pair["clip_id"]]["sha256"]
    assert len({(row["shard"], row["row"]) for row in rows.values()}) == 12
    for key in ("vae_digest", "tokenizer_digest", "text_encoder_digest"):
        assert len({row[key] for row in rows.values()}) == 1
    assert len({row["prompt_sha256"] for row in rows.values()}) == len({pair["prompt"] for pair in pairs})


def test_latents_are_the_means_that_wan_would_denoise_to(encoded, digits_root, profile):
    root, pairs, rows = encoded
    clips = {clip["id"]: clip for clip in digits_root[1]}
    vae = load_vae(root / profile["base"])
    mean, std = (torch.tensor(getattr(vae.config, key)).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    for pair in pairs[::5]:
        ((clip, content),) = read_clips(root / "data/clips", [clips[pair["clip_id"]]])
        pixels = torch.from_numpy(open_clip(clip, content)[0]).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            expected = (vae.encode(pixels).latent_dist.mean - mean) / std
        found = sample(root, rows[pair["id"]], profile)["latents"]
        assert found.shape == (1, 4, 3, 8, 8)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_prompt_states_are_those_of_diffusers_own_pipeline(encoded, profile):
    from diffusers import WanPipeline

    root, pairs, rows = encoded
    pipeline = WanPipeline.from_pretrained(root / profile["base"])
    found = sample(root, rows[pairs[7]["id"]], profile)
    for prompt, states in ((pairs[7]["prompt"], found["prompt_embeds"][0]), ("", found["empty_embeds"])):
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
        torch.testing.assert_close(states, expected[0], rtol=2**-7, atol=1e-3)


def test_the_target_text_is_the_prompt_in_stage_1_and_the_caption_in_stage_2(encoded, profile):
    root, pairs, rows = encoded
    tokenizer = load_tokenizer(root / profile["base"])
    length = profile["text"]["caption_tokens"][1]
    for pair in pairs[:3]:
        batch = sample(root, rows[pair["id"]], profile)
        for key, text in (("prompt_ids", pair["prompt"]), ("target_ids", pair["caption"] or pair["prompt"])):
            ids = batch[key][0].tolist()
            end = ids.index(tokenizer.eos_token_id)
            assert ids[:end] == tokenizer(text, add_special_tokens=False).input_ids
            assert ids[end + 1 :] == [tokenizer.pad_token_id] * (length - end - 1)


def snapshot(root):
    home = root / "data/latents"
    return {file.relative_to(home).as_posix(): file.read_bytes() for file in home.rglob("*") if file.is_file()}


@contextlib.contextmanager
def not_loaded(monkeypatch, *names):
    """Fail if one of these parts of the base is loaded."""
    with monkeypatch.context() as context:
        for name in names:
            context.setattr(encoders, f"load_{name}", lambda *_, name=name: pytest.fail(f"the {name} was loaded"))
        yield


def test_equal_pairs_give_equal_bytes_and_finished_shards_need_no_encoder(encoded, profile, monkeypatch):
    root, _, _ = encoded
    before = snapshot(root)
    with not_loaded(monkeypatch, "vae", "text_encoder"):
        run_stage(STEP, profile, root)
    assert snapshot(root) == before
    (root / "data/latents/shards/00001/latents.safetensors").write_bytes(b"corrupt")
    run_stage(STEP, profile, root)
    assert snapshot(root) == before


def fresh(root, profile, copy):
    """Another work root with the step's inputs and without its output."""
    for name in (profile["base"], "data/clips", "data/pairs"):
        shutil.copytree(root / name, copy / name)
    return copy


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_no_encoder_is_needed_afterwards(
    encoded, profile, monkeypatch, tmp_path
):
    root = fresh(encoded[0], profile, tmp_path / "parts")
    (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    make_parts(STEP, str(root / "profile.yaml"), root, 2)
    assert not (root / "data/latents").exists()
    with not_loaded(monkeypatch, "vae", "text_encoder"):
        run_stage(STEP, profile, root)
    assert snapshot(root) == snapshot(encoded[0])


def elsewhere(root, profile, tmp_path):
    """The output of a run in another work root, without tensors to reuse."""
    run_stage(STEP, profile, fresh(root, profile, tmp_path / "fresh"))
    return snapshot(tmp_path / "fresh")


def test_new_captions_encode_nothing_again(encoded, profile, recommit, monkeypatch, tmp_path):
    root, pairs, _ = encoded
    for pair in pairs:
        pair["caption"] = pair["caption"] and f"{pair['caption']} at all"
    recommit(root, "validate-pairs", {"pairs": pairs})
    with not_loaded(monkeypatch, "vae", "text_encoder"):
        run_stage(STEP, profile, root)
    assert snapshot(root) == elsewhere(root, profile, tmp_path)


def test_a_new_text_encoder_encodes_no_video_again(encoded, profile, monkeypatch, tmp_path):
    root, _, _ = encoded
    path = root / profile["base"] / "text_encoder/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with not_loaded(monkeypatch, "vae"):
        run_stage(STEP, profile, root)
    assert snapshot(root) == elsewhere(root, profile, tmp_path)


def test_a_new_autoencoder_encodes_every_video_and_no_text_again(encoded, profile, monkeypatch, tmp_path):
    root, _, _ = encoded
    path = root / profile["base"] / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    before = snapshot(root)
    with not_loaded(monkeypatch, "text_encoder"):
        run_stage(STEP, profile, root)
    after = snapshot(root)
    assert after == elsewhere(root, profile, tmp_path)
    assert after["shards/00000/latents.safetensors"] != before["shards/00000/latents.safetensors"]


@pytest.mark.parametrize(
    ("file", "function", "facts"),
    [
        ("components/latents/encoders.py", "_check_whole", {"video_code", "text_code"}),
        ("components/latents/encoders.py", "latent_means", {"video_code"}),
        ("components/latents/encoders.py", "text_states", {"text_code"}),
        ("model/univigu/wan.py", "encode_frames", {"video_code"}),
        ("model/univigu/wan.py", "encode_prompts", {"text_code"}),
        ("model/univigu/wan.py", "decode_latents", set()),
        ("model/univigu/video.py", "fit_frames", {"video_code"}),
        ("components/prompts/tokens.py", "load_tokenizer", {"text_code"}),
        ("components/prompts/tokens.py", "count_tokens", set()),
    ],
)
def test_tensors_are_reused_only_if_their_code_is_the_same(file, function, facts, profile, project):
    step = SimpleNamespace(settings=read_sections(profile))
    before = code_facts(step)
    path = project / file
    assert f"\ndef {function}(" in path.read_text()
    path.write_text(path.read_text().replace(f"\ndef {function}(", f"\n@print\ndef {function}("))
    assert {name for name, digest in code_facts(step).items() if digest != before[name]} == facts


@pytest.mark.slow
def test_clips_are_reused_in_whole_batches_and_damaged_tensors_never(encoded, profile, recommit, monkeypatch, tmp_path):
    root, pairs, _ = encoded
    asked, ask = [], Encoders.encode_clips
    monkeypatch.setattr(Encoders, "encode_clips", lambda self, clips: asked.append(len(clips)) or ask(self, clips))

    def encode(some):
        asked.clear()
        recommit(root, "validate-pairs", {"pairs": some})
        run_stage(STEP, profile, root)
        return sum(asked)

    assert encode(pairs[:11]) == 1  # shards of 5, batches of 3: the last batch had two clips, and has one now
    assert snapshot(root) == elsewhere(root, profile, tmp_path / "of-3")
    profile["encode_latents"]["batch_size"] = 1
    assert encode(pairs[:11]) == 11
    assert encode(pairs) == 1
    assert encode(pairs[2:]) == 0
    assert snapshot(root) == elsewhere(root, profile, tmp_path / "of-1")
    shard = bytearray((root / "data/latents/shards/00001/latents.safetensors").read_bytes())
    shard[-1] ^= 1
    (root / "data/latents/shards/00001/latents.safetensors").write_bytes(shard)
    assert encode(pairs[3:]) == 5  # the clips of the damaged shard


def test_a_run_killed_within_a_shard_loses_one_batch_and_resumes_to_the_same_bytes(
    encoded, profile, tmp_path, monkeypatch
):
    root = fresh(encoded[0], profile, tmp_path / "killed")
    asked, ask = [], Encoders.encode_clips

    def stop_at_third(self, clips):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(clips))
        return ask(self, clips)

    with monkeypatch.context() as context:
        context.setattr(Encoders, "encode_clips", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            run_stage(STEP, profile, root)
    monkeypatch.setattr(Encoders, "encode_clips", lambda self, clips: asked.append(len(clips)) or ask(self, clips))
    run_stage(STEP, profile, root)
    assert sum(asked) == 12
    assert snapshot(root) == snapshot(encoded[0])


def test_every_shard_holds_one_bucket_and_clips_that_fit_none_are_quarantined(encoded, profile, recommit):
    root, _, _ = encoded
    profile["video"]["buckets"] = [[9, 32, 32], [5, 32, 32], [9, 32, 64]]
    profile["encode_latents"]["shard_size"] = 3
    clips = read_table(root / "data/clips", "clips").to_pylist()
    tar, sizes = {}, [(9, 32, 32), (9, 32, 64), (4, 40, 40), (2, 32, 32), (50, 32, 32), (9, 16, 16), (9, 32, 160)]
    for clip, (count, height, width) in zip(clips, sizes, strict=False):
        ramp = np.linspace(0, 255, count)[:, None, None, None]
        content = encode_mp4(np.broadcast_to(ramp, (count, height, width, 3)).astype(np.uint8), 8)
        clip.update(frames=count, height=height, width=width, sha256=hashlib.sha256(content).hexdigest())
        tar[clip["member"]] = content
    old = dict(read_tar(root / "data/clips/shards/00000/clips.tar"))
    other = dict(read_tar(root / "data/clips/shards/00001/clips.tar"))
    write_tar(root / "data/clips/shards/00000/clips.tar", {**old, **{k: v for k, v in tar.items() if k in old}})
    write_tar(root / "data/clips/shards/00001/clips.tar", {**other, **{k: v for k, v in tar.items() if k in other}})
    recommit(root, "synthesize-videos", {"clips": clips})
    manifest = run_stage(STEP, profile, root)
    assert manifest["reasons"] == {"aspect": 1, "too_long": 1, "too_short": 1, "too_small": 1}
    assert manifest["facts"]["buckets"] == {"5x32x32": 1, "9x32x32": 6, "9x32x64": 1}
    rows = read_table(root / "data/latents", "latents").to_pylist()
    by_shard = {}
    for row in rows:
        by_shard.setdefault(row["shard"], set()).add((row["frames"], row["height"], row["width"]))
        shape = sample(root, row, profile)["latents"].shape
        assert shape == (1, 4, (row["frames"] - 1) // 4 + 1, row["height"] // 4, row["width"] // 4)
    assert sorted(by_shard.values(), key=str) == [{(5, 32, 32)}, {(9, 32, 32)}, {(9, 32, 32)}, {(9, 32, 64)}]


def spoil(root, profile, part, **values):
    path = root / profile["base"] / part / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae", {"z_dim": 16}, "no 'latents_mean' of 16 values"),
        ("vae", {"latents_std": None}, "no 'latents_std' of 4 values, so its latents can't be normalised"),
        ("vae", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "no 'latents_std'"),
        ("vae", {"_class_name": "AutoencoderKL"}, "is AutoencoderKL, not AutoencoderKLWan"),
        ("vae", {"scale_factor_spatial": None}, "declares compression factors of 8 .* its layers have 4"),
        ("transformer", {"in_channels": 16}, "makes latents of 4 channels and its transformer takes 16"),
    ],
)
def test_a_wrong_autoencoder_is_refused_before_anything_is_read(encoded, profile, part, values, message, monkeypatch):
    root, _, _ = encoded
    spoil(root, profile, part, **values)
    with not_loaded(monkeypatch, "vae", "text_encoder"), pytest.raises(BadInputError, match=message):
        run_stage(STEP, profile, root)


def test_a_size_that_the_base_would_round_is_refused(encoded, profile):
    profile["video"]["buckets"] = [[9, 32, 32], [10, 32, 36]]
    with pytest.raises(ConfigError, match=r"can't take clips of 10 frames of 32x36: choose 4k \+ 1 frames"):
        run_stage(STEP, profile, encoded[0])


def lose(path):
    path.unlink()


def lack(path):
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def point(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize("load", [load_vae, lambda base: load_text_encoder(base, "fp32")], ids=["vae", "text_encoder"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lose, MissingInputError, "no weights"),
        (lack, ConfigError, "its file lacks"),
        (point, ConfigError, "can't be loaded"),
    ],
)
def test_the_error_for_missing_or_incomplete_weights_has_the_command_that_fetches_them(
    tiny_wan_folder, tmp_path, load, spoil, error, message
):
    base = shutil.copytree(tiny_wan_folder, tmp_path / "Wan2.1-T2V-1.3B-Diffusers")
    for part in ("vae", "text_encoder"):
        spoil(next((base / part).glob("*.safetensors")))
    with pytest.raises(error, match=rf"{message}.*univigu fetch Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"):
        load(base)


def test_a_damaged_clip_is_quarantined(encoded, digits_root, profile, recommit):
    root, _, _ = encoded
    rows = digits_root[1]
    rows[2]["sha256"] = "0" * 64
    recommit(root, "synthesize-videos", {"clips": rows})
    assert run_stage(STEP, profile, root)["reasons"] == {"damaged": 1}
    assert "sc02" not in {row["id"] for row in read_table(root / "data/latents", "latents").to_pylist()}


def test_pairs_of_missing_clips_are_refused(encoded, digits_root, profile, recommit):
    root, _, _ = encoded
    recommit(root, "synthesize-videos", {"clips": digits_root[1][1:]})
    with pytest.raises(BadInputError, match="1 clips of the pairs no longer exist, such as c00"):
        run_stage(STEP, profile, root)


def test_a_text_that_is_too_long_is_refused(tiny_wan_folder):
    encoders = Encoders(tiny_wan_folder, "fp32", prompt_length=32, text_length=8)
    with pytest.raises(BadInputError, match="more than the profile's 8"):
        encoders.token_ids(["a red digit", "a red digit that moves on and on and on"])
