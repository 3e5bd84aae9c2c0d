"""What is advised about a missing model folder."""

from pathlib import Path

import pytest

from components.pipeline.weights import how_to_fetch


@pytest.mark.parametrize(
    ("folder", "advice"),
    [
        ("model/Wan2.1-T2V-1.3B-Diffusers", "`univigu fetch Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to "),
        ("/work/root/model/tiny-wan", "`git checkout HEAD -- /work/root/model/tiny-wan`"),
        ("model/LTX-Video", "`univigu fetch OWNER/NAME --to FOLDER`"),
    ],
)
def test_the_advice_fits_where_the_model_comes_from(folder, advice):
    assert advice in how_to_fetch(Path(folder))
