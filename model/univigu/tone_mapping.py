"""Tone mapping of HDR pixels for a standard screen: from BT.2100 (PQ or HLG, BT.2020 primaries) to BT.709.

FFmpeg's own scaler can do this too, but needs eight seconds of preparation for each frame size. Here the brightness of
each pixel (that of its strongest primary) is mapped by the EETF of ITU-R BT.2390, from `PEAK` to the reference white of
BT.2408: shadows and faces keep their brightness, highlights are compressed, hues don't change. It needs only numpy.
"""

from functools import cache

import numpy as np

PEAK = 1000.0  # cd/m2; brighter pixels are clipped. Most HDR is graded for this value
WHITE = 203.0  # cd/m2 of reference white, which becomes the white of a standard screen
_GAMMA = 2.4  # of a standard screen (BT.1886)
_TO_BT709 = np.float32(  # from BT.2020 primaries, linear: the inverse of BT.2087's matrix
    # pyrefly: ignore[bad-argument-type]
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)
# pyrefly: ignore[bad-argument-type]
_LUMA = np.float32([0.2627, 0.6780, 0.0593])  # of BT.2020


def to_sdr(signal: np.ndarray, transfer: str) -> np.ndarray:
    """HDR signal uint16 (H, W, 3), RGB in full range, as uint8 (H, W, 3) for a BT.709 screen.

    transfer: "pq" or "hlg".
    """
    light = _LIGHT[transfer]()[signal]
    if transfer == "hlg":  # the OOTF of BT.2100: brighter scenes get more contrast
        light = light * (np.maximum(light @ _LUMA, 1e-6) ** 0.2)[..., None] * np.float32(PEAK)
    brightness = light.max(axis=-1)
    nits, gains = _gains()
    shown = light * np.interp(brightness, nits, gains).astype(np.float32)[..., None]
    encoded = np.clip(shown @ _TO_BT709.T, 0, 1) ** np.float32(1 / _GAMMA)
    return (encoded * 255).round().astype(np.uint8)


def pq_to_nits(signal: np.ndarray) -> np.ndarray:
    """Light in cd/m2 of a PQ signal in [0, 1] (SMPTE ST 2084, equation 4.1)."""
    power = np.asarray(signal, np.float64) ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def nits_to_pq(nits: np.ndarray | float) -> np.ndarray:
    """The inverse of `pq_to_nits`."""
    power = (np.asarray(nits, np.float64) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_scene(signal: np.ndarray) -> np.ndarray:
    """Light of the scene in [0, 1] of an HLG signal in [0, 1] (BT.2100-2, table 5)."""
    signal = np.asarray(signal, np.float64)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


@cache
def _pq_light() -> np.ndarray:
    return pq_to_nits(np.arange(65536) / 65535).astype(np.float32)


@cache
def _hlg_light() -> np.ndarray:
    return hlg_to_scene(np.arange(65536) / 65535).astype(np.float32)


_LIGHT = {"pq": _pq_light, "hlg": _hlg_light}


@cache
def _gains() -> tuple[np.ndarray, np.ndarray]:
    """Brightness values in cd/m2, and the factor for a pixel of each, by which `WHITE` becomes 1."""
    top = nits_to_pq(PEAK)
    signal = np.linspace(0, 1, 2049)[1:]  # of the source's own range
    white = nits_to_pq(WHITE) / top
    knee = 1.5 * white - 0.5
    t = (signal - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white
    nits = pq_to_nits(signal * top)
    gains = pq_to_nits(np.where(signal < knee, signal, spline) * top) / WHITE / nits
    return np.append(nits, 10_000), np.append(gains, 1 / 10_000)
