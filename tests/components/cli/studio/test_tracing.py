"""What is seen of a result on the way, with the bundled model."""

import time
from pathlib import Path

import numpy as np
import pytest

from components.cli import chosen_model
from components.cli.studio.tracing import Stopped, Tracer, fit_colours, picture
from components.digits import world

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[4] / "model/tiny-univigu"
PROMPT = "a red seven moves left"


@pytest.fixture(scope="module")
def pipeline():
    return chosen_model.load(MODEL)


@pytest.fixture(scope="module")
def colours(pipeline):
    rng = np.random.default_rng(0)
    attributes = [world.sample_attributes(rng) for _ in range(40)]
    return fit_colours(
        pipeline.vae, list(world.render(attributes, world.draw_scans(attributes, world.train_scans(), 1), 1))
    )


def test_the_video_is_seen_after_each_step_and_ends_as_the_result(pipeline, colours):
    tracer = Tracer(pipeline, 3, lambda *_: False, colours, 12, 0)
    (frames,) = pipeline.generate(PROMPT, seed=[3], callback_on_step_end=tracer)
    taus = [moment.video_tau for moment in tracer.trace]
    assert (len(taus), taus[-1], sorted(taus)) == (12, 1.0, taus)
    shown = tracer.trace[-1].frames
    assert shown.shape == (3, 16, 16, 3)
    assert np.array_equal(tracer.video(pipeline), frames)
    small = frames.reshape(9, 16, 2, 16, 2, 3).mean((2, 4))
    truth = np.stack([small[0], small[1:5].mean(0), small[5:].mean(0)])
    assert np.abs(shown - truth).mean() < 20  # of 255
    assert picture(shown).startswith("data:image/png;base64,")


def test_a_preview_costs_at_most_a_twentieth_of_its_step(pipeline, colours):
    tracer = Tracer(pipeline, 3, lambda *_: False, colours, 50, 0)
    began = time.perf_counter()
    pipeline.generate(PROMPT, num_inference_steps=50, seed=[3], callback_on_step_end=tracer)
    assert tracer.seconds <= 0.05 * (time.perf_counter() - began)


def test_a_run_ends_where_it_is_stopped_with_what_is_predicted_there(pipeline, colours):
    tracer = Tracer(pipeline, 3, lambda step, _: step == 9, colours, 12, 0)
    with pytest.raises(Stopped):
        pipeline.generate(PROMPT, seed=[3], callback_on_step_end=tracer)
    assert len(tracer.trace) == 9
    (whole,) = pipeline.generate(PROMPT, seed=[3])
    early = tracer.video(pipeline)
    assert early.shape == whole.shape
    assert 0 < np.abs(early.astype(int) - whole).mean() < 30


def test_text_and_video_share_their_moments_in_a_joint_result(pipeline, colours):
    tracer = Tracer(pipeline, 3, lambda *_: False, colours, 12, 12)
    _, (text,) = pipeline.joint(
        PROMPT,
        in_step=True,
        seed=[3],
        return_dict=False,
        callback_on_step_end=tracer,
        callback_on_step_end_tensor_inputs=list(tracer.inputs),
    )
    assert [(moment.text_tau, moment.frames is not None) for moment in tracer.trace][-1] == (1.0, True)
    assert len(tracer.trace) == 12
    assert tracer.text(pipeline).split()[:3] == text.split()[:3]
