"""Existing videos and captions are imported as clips for the rest of the pipeline, and nothing is lost silently."""

import json
import os
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from components.cli.main import app
from components.clips import import_videos as module
from components.clips.archive import open_clip, read_clips
from components.clips.import_videos import first_sentence, import_folder, import_part
from components.digits import world
from components.pipeline.freshness import finished
from components.pipeline.manifests import verify
from components.pipeline.runner import run_part, run_stage
from components.pipeline.tables import read_table
from components.pipeline.workspace import Part
from components.registry.withdrawal import Request, withdraw
from small_videos import sound, turned, write_video
from univigu.errors import ConfigError
from univigu.video import encode_mp4

OPTIONS = {"licence": "CC0-1.0", "source": "a test", "texts": "captions"}


def caption(number):
    """A caption of the toy dataset within its token range; each number gives another."""
    rng = np.random.default_rng(number)
    return world.write_plain_caption(world.sample_attributes(rng))


@pytest.fixture
def root(tmp_path, tiny_wan_folder, profile):
    shutil.copytree(tiny_wan_folder, tmp_path / "root" / profile["base"])
    return tmp_path / "root"


@pytest.fixture
def profile(profile):
    for check in profile["synthesize_videos"]["checks"].values():
        check["mode"] = "off"
    profile["import_videos"]["max_rejected_share"] = 1.0
    profile["validate_data"].update(min_rows=1, caption_checks=[])
    return profile


@pytest.fixture
def folder(tmp_path):
    """Twelve videos of a second at 8 frames a second, each with a text file beside it."""
    for number in range(12):
        name = tmp_path / f"videos/{'deep/' if number % 2 else ''}v{number:02d}.mp4"
        write_video(name, np.arange(9) / 8, dark=40 + 4 * number)
        name.with_suffix(".txt").write_text(caption(number))
    return tmp_path / "videos"


def rejected(root):
    return {row["id"]: row["reason"] for row in read_table(root / "data/clips", "rejected").to_pylist()}


def snapshot(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / "data").rglob("*") if p.is_file()}


def frames_of(root, profile):
    """The frames of each imported clip by the name of its file's prompt."""
    rows = read_table(root / "data/clips", "clips").to_pylist()
    return {row["prompt"]: open_clip(row, content)[0] for row, content in read_clips(root / "data/clips", rows)}


def brightness(frames):
    return frames.mean(axis=(1, 2, 3))


@pytest.mark.slow
def test_imported_clips_pass_the_gates_and_are_encoded(folder, root, profile):
    profile["synthesize_videos"]["stage_1_share"] = 0.5
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (12, 12, 0)
    before = snapshot(root)
    for step in ("curate-prompts", "synthesize-videos", "caption-videos"):
        assert run_stage(step, profile, root)["step"].startswith("import-")
        assert finished(step, profile, root)["step"].startswith("import-")
    assert run_part("synthesize-videos", profile, root, Part(1, 2)) == {"made": 0, "kept": 0}
    assert snapshot(root) == before
    for step in ("validate-prompts", "validate-clips", "validate-pairs", "encode-latents"):
        run_stage(step, profile, root)
    pairs = read_table(root / "data/pairs", "pairs").to_pylist()
    assert len(read_table(root / "data/latents", "latents")) == len(pairs) == 12
    assert {(pair["stage"], pair["caption"] is None) for pair in pairs} == {(1, True), (2, False)}
    captions = {caption(number) for number in range(12)}
    assert {pair["caption"] for pair in pairs if pair["stage"] == 2} < captions
    assert all(any(text.startswith(pair["prompt"]) for text in captions) for pair in pairs)
    prompts = read_table(root / "data/validated/prompts", "prompts").to_pylist()
    assert {(row["source"], row["licence"]) for row in prompts} == {("a test", "CC0-1.0")}


def test_frames_are_sampled_by_their_timestamps(root, profile, tmp_path):
    """The clip's frames are equally spaced in time, even if the video's aren't."""
    folder = tmp_path / "videos"
    clocks = {
        "even": np.arange(9) / 8,
        "fast": np.arange(34) / 30,
        "uneven": np.concatenate([np.arange(20) / 40, 0.5 + np.arange(5) / 8]),
        "from-late": 5 + np.arange(9) / 8,
        "two-seconds": np.arange(61) / 30,
    }
    for name, times in clocks.items():
        write_video(folder / f"{name}.mp4", times if name != "from-late" else times - 4)
        (folder / f"{name}.txt").write_text(name)
    import_folder(folder, None, {**OPTIONS, "texts": "prompts"}, profile, root)
    found = {name: brightness(frames) for name, frames in frames_of(root, profile).items()}
    for name, start in (("even", 40), ("fast", 40), ("from-late", 120), ("two-seconds", 40)):
        expected = start + 80 * np.linspace(0, 1, 9)
        np.testing.assert_allclose(found[name], expected, atol=6, err_msg=name)
    np.testing.assert_allclose(found["uneven"], 40 + 80 * np.arange(9) / 8, atol=6)


def test_clips_are_upright_centre_crops_with_square_pixels(root, profile, tmp_path):
    profile["video"]["buckets"] = [[9, 32, 32], [9, 64, 32], [9, 32, 64]]
    folder = tmp_path / "videos"
    folder.mkdir()
    stripes = np.zeros((9, 34, 66, 3), np.uint8)
    stripes[:, :17, :33] = 255
    (folder / "lying.mp4").write_bytes(encode_mp4(stripes, 8))
    (folder / "standing.mp4").write_bytes(turned(encode_mp4(stripes, 8)))
    (folder / "odd.mp4").write_bytes(encode_mp4(np.full((9, 45, 47, 3), 90, np.uint8), 8))
    write_video(folder / "wide-pixels.mp4", np.arange(9) / 8, 32, 32, pixel=Fraction(2, 1))
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    import_folder(folder, None, {**OPTIONS, "texts": "prompts"}, profile, root)
    found = frames_of(root, profile)
    assert {name: frames.shape[1:3] for name, frames in found.items()} == {
        "lying": (32, 64),
        "standing": (64, 32),
        "odd": (32, 32),
        "wide-pixels": (32, 64),
    }
    corners = {name: found[name][0, [3, 3, -4, -4], [3, -4, 3, -4], 0] > 128 for name in ("lying", "standing")}
    assert corners["lying"].tolist() == [True, False, False, False]
    assert corners["standing"].tolist() == [False, True, False, False]


def test_unusable_videos_are_quarantined_with_their_reasons(folder, root, profile):
    profile["import_videos"]["take"] = "squeeze"
    whole = (folder / "v00.mp4").read_bytes()
    noisy = encode_mp4(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8), 8)
    middle = noisy.index(b"mdat") + (len(noisy) - noisy.index(b"mdat")) // 2
    hole = bytes(3000)  # longer than a frame: FFmpeg doesn't notice every shorter one
    bad = {
        "cut": whole[: len(whole) // 2],
        "hole": noisy[:middle] + hole + noisy[middle + len(hole) :],
        "sound": sound(),
        "text": b"this is no video\n" * 100,
        "empty": b"",
        "twin": whole,
    }
    for name, content in bad.items():
        (folder / f"{name}.mp4").write_bytes(content)
        (folder / f"{name}.txt").write_text(caption(0))
    write_video(folder / "blink.mp4", [0, 0.1])
    write_video(folder / "film.mp4", np.arange(60) / 8, dark=0)
    write_video(folder / "years.mkv", [0, 0.1, 1e6], dark=0)
    write_video(folder / "stamp.mp4", np.arange(9) / 8, 8, 8)
    write_video(folder / "banner.mp4", np.arange(9) / 8, 32, 128)
    for name in ("blink", "film", "years", "stamp", "banner"):
        (folder / f"{name}.txt").write_text(caption(0))
    write_video(folder / "silent.mp4", np.arange(9) / 8, dark=20)
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    assert {Path(name).stem: reason for name, reason in rejected(root).items()} == {
        "cut": "damaged",
        "hole": "damaged",
        "text": "damaged",
        "empty": "damaged",
        "sound": "no_video",
        "v00": "duplicate",
        "blink": "too_short",
        "film": "too_long",
        "years": "too_long",
        "stamp": "too_small",
        "banner": "aspect",
        "silent": "no_text",
    }
    assert (manifest["rows_in"], manifest["rows_out"]) == (24, 12)
    assert str(folder) not in (root / "data/clips/rejected.parquet").read_bytes().decode(errors="ignore")
    details = [row["detail"] for row in read_table(root / "data/clips", "rejected").to_pylist()]
    assert not any(str(folder) in detail for detail in details)


def test_one_odd_file_ends_no_import(folder, root, profile, tmp_path):
    """A title that isn't UTF-8, an unknown codec, a link out of the folder, a pipe, a file that claims gigabytes."""
    (tmp_path / "elsewhere.mp4").write_bytes((folder / "v00.mp4").read_bytes())
    with av.open(str(folder / "old.avi"), "w") as container:
        container.metadata["title"] = "Xxxxxxx"
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(9):
            picture = np.full((32, 32, 3), 40 + 10 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    old = (folder / "old.avi").read_bytes()
    (folder / "old.avi").write_bytes(old.replace(b"Xxxxxxx", "Отпуск!".encode("cp1251")))
    (folder / "unknown.avi").write_bytes(old.replace(b"FMP4", b"QQQQ"))
    pixel = b"\x2c" + struct.pack("<4H", 0, 0, 1, 1) + b"\0\2\2\x44\1\0;"
    (folder / "huge.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 16_000, 16_000) + b"\xf0\0\0" + bytes(6) + pixel)
    (folder / "out.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    for number, name in enumerate(("old", "unknown", "huge", "out", "pipe")):
        (folder / f"{name}.txt").write_text(caption(20 + number))
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    assert rejected(root) == {
        "unknown.avi": "codec",
        "huge.gif": "too_large",
        "out.mp4": "outside",
        "pipe.mp4": "not_a_file",
    }
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (17, 13, 4)


def test_a_long_video_becomes_clips_at_its_own_speed(root, profile, tmp_path):
    folder = tmp_path / "videos"
    write_video(folder / "long.mp4", np.arange(53) / 15, dark=0)  # 15 frames a second for 3.53 seconds
    write_video(folder / "short.mp4", np.arange(10) / 15)
    for name in ("long", "short"):
        (folder / f"{name}.txt").write_text(caption(0) if name == "long" else caption(1))
    profile["video"]["fps"] = 9  # a clip is a second long
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    rows = read_table(root / "data/clips", "clips").to_pylist()
    spans = [(score["start"], score["end"], score["speed"]) for score in (json.loads(row["scores"]) for row in rows)]
    assert spans == [(0.0, 1.0, 1.0), (1.0, 2.0, 1.0), (2.0, 3.0, 1.0)]
    assert rejected(root) == {"short.mp4": "too_short"}
    assert (manifest["rows_in"], manifest["facts"]["videos"]) == (4, {"used": 1, "of": 2})
    assert manifest["facts"]["seconds"] == {"unused": 0.556, "of": 3.556}
    assert manifest["facts"]["captions"] == {"usable": 3}
    assert len({row["seed"] for row in rows}) == 3
    assert len({row["generator_digest"] for row in rows}) == len({row["stage"] for row in rows}) == 1
    captions = read_table(root / "data/clips", "captions").to_pylist()
    assert [row["clip_id"] for row in captions] == [row["id"] for row in rows]
    content = list(read_clips(root / "data/clips", rows))
    assert [brightness(open_clip(*one)[0])[0].round(-1) for one in content] == [0, 80, 160]


def hdr_video(path):
    """An HDR (PQ) video of steadily rising brightness."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p10le"
        stream.options = {"x265-params": "log-level=none:colorprim=9:transfer=16:colormatrix=9"}
        stream.codec_context.color_trc, stream.codec_context.color_primaries = 16, 9
        for level in range(9):
            picture = np.full((32, 32, 3), 20_000 + 2_000 * level, np.uint16)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb48le")))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text(path.stem)


@pytest.mark.parametrize("choice", ["tone_map", "quarantine"])
def test_hdr_is_tone_mapped_or_quarantined_according_to_the_profile(root, profile, tmp_path, choice):
    folder = tmp_path / "videos"
    write_video(folder / "plain.mp4", np.arange(9) / 8)
    (folder / "plain.txt").write_text("plain")
    hdr_video(folder / "bright.mp4")
    profile["video"]["fit"]["hdr"] = choice
    manifest = import_folder(folder, None, {**OPTIONS, "texts": "prompts"}, profile, root)
    kept = {row["prompt"]: json.loads(row["scores"]) for row in read_table(root / "data/clips", "clips").to_pylist()}
    if choice == "quarantine":
        assert (rejected(root), kept.keys(), manifest["facts"]["tone_mapped"]) == ({"bright.mp4": "hdr"}, {"plain"}, 0)
    else:
        assert (rejected(root), manifest["facts"]["tone_mapped"]) == ({}, 1)
        assert {name: "tone_mapped" in scores for name, scores in kept.items()} == {"plain": False, "bright": True}
        assert (np.diff(brightness(frames_of(root, profile)["bright"])) > 2).all()


def test_a_clip_that_fails_the_gate_is_quarantined_with_its_scores(folder, root, profile):
    profile["synthesize_videos"]["checks"]["blank"]["mode"] = "enforce"
    assert import_folder(folder, None, OPTIONS, profile, root)["reasons"] == {"blank": 12}
    row = json.loads(read_table(root / "data/clips", "rejected").to_pylist()[0]["row"])
    assert set(row["scores"]) == {"contrast"}


def test_an_import_gives_equal_bytes_elsewhere_and_after_a_kill(folder, root, profile, tmp_path, monkeypatch):
    profile["import_videos"]["shard_size"] = 5
    monkeypatch.setattr(module, "BATCH", 2)
    import_folder(folder, None, OPTIONS, profile, root)
    other, moved = tmp_path / "other", shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.copytree(root / profile["base"], other / profile["base"])
    made, make = [], module.make_clips

    def stop_at_seventh(*arguments):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(arguments[-1]["file"])
        return make(*arguments)

    with monkeypatch.context() as context:
        context.setattr(module, "make_clips", stop_at_seventh)
        with pytest.raises(KeyboardInterrupt):
            import_folder(moved, None, OPTIONS, profile, other)
    monkeypatch.setattr(module, "make_clips", lambda *arguments: made.append(arguments[-1]["file"]) or make(*arguments))
    import_folder(moved, None, OPTIONS, profile, other)
    assert len(made) <= 13
    assert snapshot(other) == snapshot(root)
    made.clear()
    import_folder(moved, None, OPTIONS, profile, other)
    assert made == []


def test_parts_of_an_import_are_kept_by_the_run_that_follows(folder, root, profile, monkeypatch):
    profile["import_videos"]["shard_size"] = 5
    parts = [import_part(folder, None, OPTIONS, profile, root, Part(number, 2)) for number in (2, 1)]
    assert parts == [{"made": 1, "kept": 0}, {"made": 2, "kept": 0}]
    assert not (root / "data/clips").exists()
    monkeypatch.setattr(module, "make_clips", lambda *_: pytest.fail("a clip was made again"))
    assert import_folder(folder, None, OPTIONS, profile, root)["rows_out"] == 12


def test_captions_come_from_a_table_and_prompts_with_them(folder, root, profile):
    rows = [f'v00.mp4,"{caption(0)}",my own prompt', f'deep/v01.mp4,"{caption(1)}",']
    (folder / "all.csv").write_text("file_name,caption,prompt\n" + "\n".join(rows) + "\nv99.mp4,x,y\nv00.mp4,again,\n")
    manifest = import_folder(folder, folder / "all.csv", OPTIONS, profile, root)
    assert manifest["rows_out"] == 2
    assert manifest["reasons"] == {"duplicate_row": 1, "no_file": 1, "no_text": 10}
    prompts = {row["prompt"] for row in read_table(root / "data/clips", "clips").to_pylist()}
    assert prompts == {"my own prompt", first_sentence(caption(1))}


def test_a_clip_whose_caption_is_out_of_range_is_used_for_stage_1(folder, root, profile):
    (folder / "v00.txt").write_text("a red five moves right. it is fast.")
    (folder / "deep/v01.txt").write_text(" ".join(caption(number) for number in range(5)))
    profile["synthesize_videos"]["stage_1_share"] = 0.0
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    assert manifest["facts"]["captions"] == {"too_long": 1, "too_short": 1, "usable": 10}
    assert manifest["facts"]["stages"] == {"1": 2, "2": 10}
    rows = read_table(root / "data/captions", "captions").to_pylist()
    assert sorted(row["status"] for row in rows) == ["skipped"] * 2 + ["success"] * 10


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Mr. Smith walks in St. Louis. It rains.", "Mr. Smith walks in St. Louis."),
        ("一只猫在草地上奔跑。阳光明媚。", "一只猫在草地上奔跑。"),
        ("एक बिल्ली दौड़ रही है। सूरज चमक रहा है।", "एक बिल्ली दौड़ रही है।"),
        ("no end in sight", "no end in sight"),
    ],
)
def test_a_first_sentence_is_found_in_any_script(text, sentence):
    assert first_sentence(text) == sentence


def test_a_file_whose_name_is_not_utf_8_is_quarantined(folder, root, profile):
    name = os.fsencode(folder) + b"/caf\xe9"
    Path(os.fsdecode(name + b".mp4")).write_bytes((folder / "v00.mp4").read_bytes() + b"\0" * 8)
    Path(os.fsdecode(name + b".txt")).write_text(caption(0))
    import_folder(folder, None, OPTIONS, profile, root)
    assert rejected(root) == {"caf?.mp4": "file_name"}


def test_the_command_asks_for_licence_and_source_and_says_what_is_next(folder, root, profile, tmp_path):
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    call = ["data", "import", str(folder), "--profile", str(tmp_path / "profile.yaml"), "--root", str(root)]
    runner = CliRunner()
    assert runner.invoke(app, call).exit_code == 2
    given = [*call, "--source", "a test", "--licence"]
    refused = runner.invoke(app, [*given, "secret"])
    assert isinstance(refused.exception, ConfigError)
    assert "'secret' is not among the profile's" in str(refused.exception)
    done = runner.invoke(app, [*given, "CC0-1.0"])
    assert "12 clips from 12 videos, 0 quarantined\nUsed 12 of 12 videos\n" in done.output
    where = f" --profile {tmp_path / 'profile.yaml'} --root {root}"
    assert f"`univigu run validate-clips{where}`, `univigu run validate-pairs{where}`" in done.output
    assert verify(root / "data/captions", "caption-videos")["step"] == "import-captions"


def test_generated_clips_are_replaced_only_on_request(folder, root, profile, tmp_path):
    (root / "data/clips").mkdir(parents=True)
    (root / "data/clips/manifest.json").write_text('{"step": "synthesize-videos"}')
    call = ["data", "import", str(folder), "--licence", "CC0-1.0", "--source", "x", "--root", str(root)]
    refused = CliRunner().invoke(app, call)
    assert "has clips made by 'synthesize-videos'; choose another --root" in str(refused.exception)


def test_a_withdrawn_video_is_not_imported_again(folder, root, profile):
    import_folder(folder, None, OPTIONS, profile, root)
    clip = read_table(root / "data/clips", "clips").to_pylist()[0]
    withdraw(Request(id=clip["id"]), root, all_of_it=False, dry_run=False)
    manifest = import_folder(folder, None, OPTIONS, profile, root)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["reasons"]) == (12, 11, {"withdrawn": 1})
    assert clip["id"] not in read_table(root / "data/captions", "captions")["clip_id"].to_pylist()
    withdraw(Request(source="a test"), root, all_of_it=True, dry_run=False)
    with pytest.raises(ConfigError, match="The source 'a test' was withdrawn"):
        import_folder(folder, None, OPTIONS, profile, root)
