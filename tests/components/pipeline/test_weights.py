"""What is advised about a missing model folder."""

from pathlib import Path

import pytest

from components.pipeline.weights import how_to_fetch


@pytest.mark.parametrize(
    ("folder", "advice"),
    [
        ("model/Wan2.1-T2V-1.3B-Diffusers", "`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir "),
        ("/work/root/model/tiny-wan", "`git checkout HEAD -- /work/root/model/tiny-wan`"),
        ("model/LTX-Video", "`hf auth login`"),
    ],
)
def test_the_advice_fits_where_the_model_comes_from(folder, advice):
    said = how_to_fetch(Path(folder))
    assert advice in said
    assert ("hf auth login" in said) == ("LTX" in folder)
