"""Pairs become tensors: Wan's own conventions, every sample once, the same bytes each time."""

import pytest
import torch

from components.encode_latents import load_encoders, token_ids
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.videos import open_clip, read_clips
from univigu.errors import BadInputError
from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef

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
    assert len({row["vae_digest"] for row in rows.values()} | {row["tokenizer_digest"] for row in rows.values()}) == 2


def test_latents_are_the_means_that_wan_would_denoise_to(encoded, digits_root, profile):
    root, pairs, rows = encoded
    clips = {clip["id"]: clip for clip in digits_root[1]}
    vae = load_encoders(root / profile["base"], "fp32").vae
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


def test_stage_1_says_its_prompt_and_stage_2_its_caption(encoded, profile):
    root, pairs, rows = encoded
    tokenizer = load_encoders(root / profile["base"], "fp32").tokenizer
    length = profile["text"]["caption_tokens"][1]
    for pair in pairs[:3]:
        batch = sample(root, rows[pair["id"]], profile)
        for key, text in (("prompt_ids", pair["prompt"]), ("target_ids", pair["caption"] or pair["prompt"])):
            ids = batch[key][0].tolist()
            end = ids.index(tokenizer.eos_token_id)
            assert ids[:end] == tokenizer(text, add_special_tokens=False).input_ids
            assert ids[end + 1 :] == [tokenizer.pad_token_id] * (length - end - 1)


def test_equal_pairs_give_equal_bytes_and_finished_shards_need_no_encoder(encoded, profile, monkeypatch):
    from components import encode_latents as module

    root, _, _ = encoded

    def snapshot():
        home = root / "data/latents"
        return {file.relative_to(home): file.read_bytes() for file in home.rglob("*") if file.is_file()}

    before = snapshot()
    with monkeypatch.context() as context:
        context.setattr(module, "load_encoders", lambda *_: pytest.fail("the encoders were loaded"))
        run_stage(STEP, profile, root)
    assert snapshot() == before
    (root / "data/latents/shards/00001/latents.safetensors").write_bytes(b"corrupt")
    run_stage(STEP, profile, root)
    assert snapshot() == before


def test_a_damaged_clip_is_quarantined(encoded, digits_root, profile, recommit):
    root, _, _ = encoded
    rows = digits_root[1]
    rows[2]["sha256"] = "0" * 64
    recommit(root, "synthesize-videos", {"clips": rows})
    assert run_stage(STEP, profile, root)["reasons"] == {"damaged": 1}
    assert "sc02" not in {row["id"] for row in read_table(root / "data/latents", "latents").to_pylist()}


def test_pairs_of_clips_that_are_gone_are_refused(encoded, digits_root, profile, recommit):
    root, _, _ = encoded
    recommit(root, "synthesize-videos", {"clips": digits_root[1][1:]})
    with pytest.raises(BadInputError, match="1 clips that are no longer there, such as c00"):
        run_stage(STEP, profile, root)


def test_a_text_that_does_not_fit_is_refused(tiny_wan_folder):
    tokenizer = load_encoders(tiny_wan_folder, "fp32").tokenizer
    with pytest.raises(BadInputError, match="over the profile's 8"):
        token_ids(tokenizer, ["a red digit", "a red digit that moves on and on and on"], 8)
