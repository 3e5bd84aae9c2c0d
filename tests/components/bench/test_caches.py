"""The benchmark of caches, at a size of seconds."""

import pytest

from components.bench import caches


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(caches, "STEPS", 8)
    monkeypatch.setattr(caches, "FEWER", (4,))
    monkeypatch.setattr(caches, "MODELS", ("model/tiny-wan",))
    monkeypatch.setattr(caches, "VIDEOS", 2)
    monkeypatch.setattr(caches, "BATCH", 1)
    monkeypatch.setattr(caches, "THRESHOLDS", {"FirstBlockCache": (0.0, 10.0), "MagCache": (10.0,)})
    monkeypatch.setattr(caches, "INTERVALS", (3,))


@pytest.mark.slow
def test_each_cache_has_what_it_skips_and_loses_beside_no_cache_and_fewer_steps(small):
    found = caches.measure()
    plain, careful, bold, magnitudes, taylor, fewer = found["models"]["model/tiny-wan"]["rows"]
    assert (plain["skipped"], plain["ratio"], plain["error"]) == (0, 1, 0)
    assert (careful["skipped"], careful["error"]) == (0, pytest.approx(0, abs=1e-4))
    assert bold["skipped"] > 0.7  # of six blocks, all but the first, in all steps but the first
    assert 0 < magnitudes["skipped"] < 1
    assert taylor["skipped"] == 0.375  # the fourth, sixth and seventh of eight steps
    assert (fewer["skipped"], fewer["setting"]) == (0.5, "4 steps")
    assert all(row["error"] > 0.001 for row in (bold, magnitudes, taylor, fewer))
    assert all(0 <= row["right"] <= 1 and row["seconds"] > 0 for row in (plain, careful, bold, magnitudes, taylor))
    assert found["ratio"] == max(row["ratio"] for row in (careful, bold, magnitudes, taylor))
