"""Where the model of a command runs."""

from components.cli.chosen_model import fits
from univigu import UniViGUPipeline


def test_a_gpu_that_holds_the_weights_alone_has_no_room_for_a_sample(speaking_model):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    weights = sum(weight.nbytes for part in parts for weight in part.parameters())
    assert fits(pipeline, 2 * weights)
    assert not fits(pipeline, weights)
    pipeline.text_encoder = None
    assert fits(pipeline, weights)
