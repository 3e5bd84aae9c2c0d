"""Checks find the faults they look for, and let good clips pass."""

import shutil

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from components.captions.captioners.measured import decide
from components.checks import blank, broken, digits, flicker, frozen, load_caption_checks, motion, texts
from components.clips import gate as clip_gate
from components.digits import measure, world
from components.digits.measure import Measurement
from univigu.errors import BadInputError, ConfigError, MissingInputError


@pytest.fixture(scope="module")
def clips():
    """40 rendered clips, uint8 (40, F, H, W, 3), and their attributes."""
    rng = np.random.default_rng(3)
    attributes = [world.sample_attributes(rng) for _ in range(40)]
    return world.render(attributes, world.draw_scans(attributes, world.heldout_scans(), 3), 3), attributes


def reasons(frames, *modules):
    """The first reason that any of the modules finds with its default thresholds."""
    found = [module.check(frames, [{}] * len(frames), module.DEFAULTS) for module in modules or (blank, broken, frozen)]
    return [next((one.reason for one in each if one.reason), None) for each in zip(*found, strict=True)]


def test_clips_that_show_something_pass(clips):
    assert reasons(clips[0]) == [None] * 40


def test_blank_frozen_and_broken_clips_are_found(clips):
    rng = np.random.default_rng(0)
    blank = np.full((9, 32, 32, 3), 112) + rng.integers(-1, 2, (9, 32, 32, 3))
    frozen = np.repeat(clips[0][0][:1], 9, axis=0).astype(int) + rng.integers(-1, 2, (9, 32, 32, 3))
    noise = rng.integers(0, 256, (9, 32, 32, 3))
    saturated = 255 * rng.integers(0, 2, (9, 32, 32, 3))
    found = np.stack([blank, frozen, noise, saturated]).clip(0, 255).astype(np.uint8)
    assert reasons(found) == ["blank", "frozen", "broken", "broken"]


def test_a_clip_of_one_frame_is_not_frozen(clips):
    assert reasons(clips[0][:2, :1]) == [None, None]


@pytest.fixture(scope="module")
def panorama():
    """A smooth picture of 200x400, of which clips show a window."""
    return uniform_filter(np.random.default_rng(0).integers(0, 256, (200, 400, 3)).astype(float), (9, 9, 0))


def pan(picture, pixels, count=9):
    """A window of 96x128 that moves over the picture to the right, so the content moves to the left."""
    return np.stack([picture[20:116, 20 + pixels * i : 148 + pixels * i] for i in range(count)]).astype(np.uint8)


def test_motion_is_measured_in_pixels_and_judged_by_the_height(panorama):
    (vectors, *_) = motion.motion_vectors(pan(panorama, 4))
    assert (np.median(vectors, axis=0) * 96).tolist() == [-4, 0]
    scores = [motion.check(pan(panorama, n)[None], [{}], motion.DEFAULTS)[0].scores["displacement"] for n in (1, 2, 4)]
    np.testing.assert_allclose(scores, np.array([1, 2, 4]) / 96, rtol=0.25)
    still, fast = pan(panorama, 0), pan(panorama, 13)
    assert reasons(np.stack([still, pan(panorama, 2), fast]), motion) == ["still", None, "hectic"]


def test_flicker_is_found_and_fades_and_pans_are_not_flicker(panorama):
    clip = pan(panorama, 2).astype(float)
    fade = clip * np.linspace(1, 0.5, 9)[:, None, None, None]
    jumps = clip + 20 * (np.arange(9) % 2)[:, None, None, None]
    found = np.stack([clip, fade, jumps]).clip(0, 255).astype(np.uint8)
    assert reasons(found, flicker) == [None, None, "flicker"]
    assert reasons(found[:, :2], flicker) == [None] * 3


@pytest.fixture(scope="module")
def aesthetic_root(tmp_path_factory):
    """A work root with a random CLIP of 16x16 pixels and a head that reads its first feature."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    root = tmp_path_factory.mktemp("aesthetic")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(root / "scorer")
    crop = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(root / "scorer")
    head = {"weight": torch.eye(8)[:1], "bias": torch.tensor([5.0])}
    save_file(head, root / "scorer/head.safetensors")
    return root


def gate_of(root, **checks):
    return clip_gate.load_gate(checks, root)


def test_the_aesthetic_score_comes_from_the_model_and_head_in_a_folder(aesthetic_root, panorama):
    clips = np.stack([pan(panorama, 2), 255 - pan(panorama, 2)])
    (check,) = gate_of(aesthetic_root, aesthetic={"mode": "enforce", "model": "scorer", "min_score": 0.0})
    scores = [found.scores["aesthetic"] for found in check.module.check(clips, [{}] * 2, check.settings)]
    assert all(4 <= score <= 6 for score in scores)
    assert scores[0] != scores[1]
    settings = {**check.settings, "min_score": sum(scores) / 2}
    assert {found.reason for found in check.module.check(clips, [{}] * 2, settings)} == {None, "unaesthetic"}
    before = clip_gate.gate_digests([check])
    (aesthetic_root / "scorer/notes.txt").write_text("another model")
    assert clip_gate.gate_digests([check]) != before


def test_a_missing_or_mismatched_scorer_is_an_error(aesthetic_root, panorama, tmp_path):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(MissingInputError, match="'aesthetic' needs a model"):
        gate_of(aesthetic_root, aesthetic={"mode": "score", "model": "elsewhere"})
    shutil.copytree(aesthetic_root / "scorer", tmp_path / "wide")
    save_file({"weight": torch.zeros(1, 12), "bias": torch.zeros(1)}, tmp_path / "wide/head.safetensors")
    (check,) = gate_of(tmp_path, aesthetic={"mode": "score", "model": "wide"})
    with pytest.raises(BadInputError, match="has no image model with a matching head"):
        check.module.check(pan(panorama, 1)[None], [{}], check.settings)


def test_a_check_is_off_scores_or_enforces(panorama, tmp_path):
    videos = np.stack([np.full((9, 96, 128, 3), 0.5), pan(panorama, 2) / 255])
    rows = [{"id": "grey"}, {"id": "good"}]

    def found(mode):
        gate = gate_of(tmp_path, blank={"mode": mode, "min_contrast": 6.0})
        return [(finding.reason, sorted(finding.scores)) for _, _, finding in clip_gate.examine(videos, rows, gate)]

    assert found("enforce") == [("blank", ["contrast"]), (None, ["contrast"])]
    assert found("score") == [(None, ["contrast"])] * 2
    assert found("off") == found(False) == [(None, [])] * 2


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"beauty": {"mode": "score"}}, "no check 'beauty'"),
        ({"blank": {"mode": "score", "contrast": 1}}, "no setting 'contrast'; its settings: min_contrast"),
    ],
)
def test_an_invalid_gate_is_refused(check, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gate_of(tmp_path, **check)


def test_a_true_prompt_passes_and_a_false_one_is_named(clips):
    frames, attributes = clips
    rng = np.random.default_rng(1)
    prompts = [world.write_prompt(one, rng) for one in attributes]
    kept = [f.reason is None for f in digits.check(frames, [{"prompt": prompt} for prompt in prompts], {})]
    assert np.mean(kept) > 0.95
    others = [next(value for value in world.COLOURS if value != one["colour"]) for one in attributes]
    found = digits.check(frames, [{"prompt": f"something {colour}"} for colour in others], {})
    assert [finding.reason for finding in found] == ["wrong_colour"] * 40
    assert "the frames show" in found[0].detail


def test_a_clip_measured_with_low_confidence_passes():
    unclear = {name: Measurement(values[0], 0.1) for name, values in world.ATTRIBUTES.items()}
    assert digits.compare("a green two on white moving left", unclear).reason is None


@pytest.fixture
def left_out(monkeypatch):
    """Every fifth training scan, for which `measure` has no template during the test."""
    scans, labels = world.train_scans()
    out = np.arange(len(labels)) % 5 == 0
    monkeypatch.setattr(world, "train_scans", lambda: (scans[~out], labels[~out]))
    measure._templates.cache_clear()
    yield scans[out], labels[out]
    measure._templates.cache_clear()


@pytest.mark.slow
def test_the_confidence_thresholds_are_those_chosen_on_training_scans(left_out):
    rng = np.random.default_rng(0)
    attributes = [world.sample_attributes(rng) for _ in range(1536)]
    frames = world.render(attributes, world.draw_scans(attributes, left_out, 0), 0)
    blurred = uniform_filter(frames.astype(np.float32), (0, 0, 3, 3, 0))
    noisy = np.clip(blurred + rng.normal(0, 16, frames.shape), 0, 255).astype(np.uint8)
    seen = measure.measure(noisy)
    for name, least in digits.CONFIDENT.items():
        sure = np.array([one[name].confidence for one in seen])
        right = np.array([one[name].value == true[name] for one, true in zip(seen, attributes, strict=True)])
        tenths = [tenth / 10 for tenth in range(5, 10)]
        assert least == next(tenth for tenth in tenths if right[sure >= tenth].mean() >= 0.98), name


def test_a_caption_must_give_each_attribute_of_its_prompt_once():
    prompt = "a green two moving left"
    assert digits.check_caption(prompt, "The green digit two moves left from the top-right.") is None
    assert "green" in digits.check_caption(prompt, "The digit two moves left.")
    assert "direction" in digits.check_caption(prompt, "The green digit two moves right.")
    assert "more than one" in digits.check_caption(prompt, "The green digit two, or a red two, moves left.")


def test_an_echo_is_a_run_of_words_from_the_instructions():
    told = "Write one paragraph of plain prose in the present tense, and do not mention these rules."
    assert texts.echo(told, "Sure: write ONE paragraph of plain prose, in the present tense!") == (
        "write one paragraph of plain prose in the"
    )
    assert texts.echo(told, "A man writes one paragraph of plain text.") == ""
    assert texts.echo("", "Anything at all may be said where there are no instructions to be repeated.") == ""


@pytest.mark.parametrize("text", ["plain", "naïve café", "الكلب يركض‏", "一只狗", "👩‍🚀 waves", "שלום", "ไทย", "नमस्ते"])
def test_text_in_any_script_is_not_damaged(text):
    assert texts.damage(text) == ""


@pytest.mark.parametrize(
    ("text", "named"),
    [("a\0b", "U+0000"), ("a\x1bb", "U+001B"), ("a\u202eb", "U+202E"), ("a\ufffdb", "U+FFFD"), ("a\ud83d", "U+D83D")],
)
def test_damage_is_named_by_its_character(text, named):
    assert texts.damage(text) == f"it holds {named}"


def test_a_caption_must_be_in_an_allowed_language():
    english = "A red dog runs along the beach in the evening light while the camera follows it from the side."
    german = "Ein roter Hund läuft im Abendlicht über den Strand, und die Kamera folgt ihm von der Seite."
    chinese = "一只红色的狗在宽阔的海滩上奔跑，傍晚的阳光照在它的毛上，镜头从侧面慢慢地跟随着它。"
    (english_only,) = load_caption_checks([{"language": {"allowed": ["en"]}}])
    assert english_only.reason == "language"
    assert [bool(english_only.find("", text)) for text in (english, german, chinese)] == [False, True, True]
    (both,) = load_caption_checks([{"language": {"allowed": ["de", "zh"]}}])
    assert [bool(both.find("", text)) for text in (english, german, chinese)] == [True, False, False]
    assert "'de'" in english_only.find("", german)


def test_a_caption_may_cover_its_prompt_with_other_forms_of_the_words():
    (check,) = load_caption_checks([{"coverage": {"least": 0.6}}])
    prompt = "two dogs running on a beach"
    assert check.find(prompt, "A pair of dogs runs along a sandy beach.") is None
    assert check.find(prompt, "A dog sleeps in a garden, under two trees.") is not None
    assert "beach" in check.find(prompt, "A cat sleeps.")
    assert check.find("", "A cat sleeps.") is None


def test_a_prompt_without_spaces_is_covered_by_pairs_of_characters():
    (check,) = load_caption_checks(["coverage"])
    caption = "一只红色的狗在宽阔的海滩上奔跑，傍晚的阳光照在它的毛上。"
    assert check.find("红色的狗在海滩上", caption) is None
    assert check.find("蓝色汽车停在城市街道", caption) is not None


@pytest.mark.parametrize("entry", ["nothing", {"language": {}}, {"coverage": {"most": 1}}, "degenerate"])
def test_an_unknown_check_and_wrong_settings_are_refused(entry):
    with pytest.raises(ConfigError):
        load_caption_checks([entry])


def test_a_prompt_with_other_case_and_punctuation_is_no_caption():
    assert texts.repeats_prompt("a red-ish two, moving left", "A red ish two moving left!")
    assert not texts.repeats_prompt("a red two", "a red two moving left")


def test_the_captioner_trusts_clear_frames_over_the_prompt_and_the_prompt_over_unclear_frames():
    truth = {"digit": "two", "colour": "red", "background": "black"}
    truth |= {"direction": "left", "speed": "fast", "start": "top-right", "end": "top-left"}
    silent = {name: set() for name in truth}
    clear = {name: Measurement(value, 0.95) for name, value in truth.items()}
    assert decide(clear, silent) == truth
    assert decide(clear, {**silent, "colour": {"blue"}}) == truth
    unclear = {**clear, "colour": Measurement("red", 0.2)}
    assert decide(unclear, silent)["colour"] == "red"
    assert decide(unclear, {**silent, "colour": {"blue"}})["colour"] == "blue"


def test_the_motion_that_the_captioner_describes_is_possible():
    rng = np.random.default_rng(0)
    for _ in range(50):
        seen = {name: Measurement(str(rng.choice(values)), rng.random()) for name, values in world.ATTRIBUTES.items()}
        said = decide(seen, {name: set() for name in seen})
        assert world.end_place(said["start"], said["direction"], said["speed"]) == said["end"]
