"""How far a clip is within a model's world, and the reference of held-out clips that a model carries."""

import shutil

import numpy as np
import pytest
import torch

from univigu import UniViGUPipeline, wan
from univigu.confidence import assess, measure
from univigu.confidence_reference import FILE, Reference, read_reference, write_reference
from univigu.errors import CorruptDataError

NOISE = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline(speaking_model):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_caption_that_the_model_would_write_is_likelier_than_another(pipeline):
    (own,) = pipeline.caption([NOISE], num_inference_steps=1, temperature=0, seed=[3])
    other = "the quick red seven moves up and stays there"
    sure, unsure = (found["confidence"] for found in measure(pipeline, [NOISE, NOISE], [own, other], [3, 3]))
    assert 0 <= unsure < sure <= 1


def test_a_clips_measures_do_not_depend_on_the_others(pipeline):
    clips, captions, seeds = [NOISE, NOISE[::-1].copy()], ["a red seven", "a clip"], [3, 8]
    together = measure(pipeline, clips, captions, seeds)
    for number, one in enumerate(zip(clips, captions, seeds, strict=True)):
        (alone,) = measure(pipeline, *([value] for value in one))
        assert alone == pytest.approx(together[number], abs=2e-4)


def test_fidelity_is_that_of_the_decoded_latents_and_does_not_depend_on_the_clips_size(pipeline):
    found = fidelity(pipeline, NOISE)
    frames = torch.from_numpy(NOISE)[None]
    again = wan.decode_latents(pipeline.vae, wan.encode_frames(pipeline.vae, frames))
    error = (frames.double() - again.double()).square().mean().item()
    assert found == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    large = NOISE.repeat(8, axis=1).repeat(8, axis=2)
    assert fidelity(pipeline, large) == pytest.approx(found, abs=1e-3)
    assert fidelity(pipeline, NOISE, with_fidelity=False) is None


def fidelity(pipeline, clip, **settings):
    (found,) = measure(pipeline, [clip], ["a clip"], [0], **settings)
    return found["fidelity"]


def test_a_clip_below_nearly_all_held_out_clips_in_one_measure_is_unusual(pipeline):
    usual = Reference(100, {"confidence": 0.0, "fidelity": 0.0}, {"confidence": 0.0, "fidelity": 0.0})
    found = assess(pipeline, NOISE, "a clip", usual)
    assert (found.unusual, found.warning) == (False, "")
    high = Reference(100, {"confidence": 0.0, "fidelity": 98.0}, {"confidence": 0.9, "fidelity": 98.5})
    found = assess(pipeline, NOISE, "a clip", high)
    assert found.unusual
    assert found.warning == (
        f"its latents reproduce it with {found.fidelity:.1f} dB (held-out clips: 98.5, and 99 % at least 98.0)"
    )


def test_without_a_reference_there_is_a_number_and_no_judgement(pipeline):
    found = assess(pipeline, NOISE, "a clip")
    assert 0 <= found.confidence < 1
    assert (found.fidelity, found.unusual, found.warning) == (None, None, "")


def test_a_reference_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path):
    assert read_reference(tmp_path) is None
    measured = [{"confidence": None, "fidelity": float(value)} for value in range(101)]
    written = write_reference(tmp_path, measured)
    assert read_reference(tmp_path) == written == Reference(101, {"fidelity": 1.0}, {"fidelity": 50.0})
    (tmp_path / "evaluation").mkdir()
    shutil.copy(tmp_path / FILE, tmp_path / "evaluation")
    assert read_reference(tmp_path / "pipeline") == written  # as in a registered version
    assert read_reference(tmp_path / "another") is None
    for text in ("{", "[]", '{"clips": 3}', '{"clips": 3, "least": {"fidelity": "x"}, "median": {}}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(CorruptDataError, match="`univigu model calibrate` writes it again"):
            read_reference(tmp_path)
