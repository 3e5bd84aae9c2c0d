"""Tone mapping: reference levels are right, greys stay grey, and nothing becomes brighter."""

import numpy as np
import pytest

from univigu.tone_mapping import hlg_to_scene, nits_to_pq, pq_to_nits, to_sdr


def grey(signal):
    return (np.asarray(signal, float)[..., None].repeat(3, -1) * 65535).round().astype(np.uint16)[None]


@pytest.mark.parametrize(
    ("nits", "signal"), [(0, 0.0), (100, 0.508078), (203, 0.580689), (1000, 0.751827), (10_000, 1.0)]
)
def test_pq_matches_the_standard(nits, signal):
    """Signals of ITU-R BT.2408, table 1, and of SMPTE ST 2084."""
    assert nits_to_pq(nits) == pytest.approx(signal, abs=2e-5)
    assert pq_to_nits(signal) == pytest.approx(nits, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("signal", "scene"), [(0.0, 0.0), (0.5, 1 / 12), (0.75, 0.26496), (1.0, 1.0)])
def test_hlg_matches_the_standard(signal, scene):
    """ITU-R BT.2100, table 5; 0.75 is a white page (BT.2408), which a screen of 1000 cd/m2 shows at 203."""
    assert hlg_to_scene(signal) == pytest.approx(scene, abs=1e-4)
    assert 1000 * hlg_to_scene(0.75) ** 1.2 == pytest.approx(203, abs=1)


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_greys_stay_grey_and_in_order_from_black_to_white(transfer):
    shown = to_sdr(grey(np.linspace(0, 1, 256)), transfer)[0].astype(int)
    assert (np.ptp(shown, axis=1) <= 1).all()
    assert (np.diff(shown[:, 1]) >= 0).all()
    assert (shown[0].tolist(), shown[-1].tolist()) == ([0] * 3, [255] * 3)


def test_a_white_page_is_nearly_white_and_half_its_light_keeps_its_place_in_both_kinds_of_hdr():
    page = [to_sdr(grey([nits_to_pq(203)]), "pq")[0, 0, 0], to_sdr(grey([0.75]), "hlg")[0, 0, 0]]
    assert abs(int(page[0]) - int(page[1])) <= 1
    assert 225 <= page[0] <= 240
    dim = to_sdr(grey([nits_to_pq(50)]), "pq")[0, 0, 0]  # below the knee light is kept: 50 / 203, as BT.1886 encodes it
    assert dim == pytest.approx(255 * (50 / 203) ** (1 / 2.4), abs=1)


def test_colours_keep_their_hue_and_those_of_bt709_come_back():
    to_bt2020 = np.linalg.inv([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    for colour in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.1]):
        light = np.clip(to_bt2020 @ np.array(colour) * 60, 0, None)  # cd/m2, below the knee
        signal = (nits_to_pq(light) * 65535).round().astype(np.uint16)[None, None]
        expected = 255 * (np.array(colour) * 60 / 203) ** (1 / 2.4)
        np.testing.assert_allclose(to_sdr(signal, "pq")[0, 0], expected, atol=12 if 0 in colour else 2)
