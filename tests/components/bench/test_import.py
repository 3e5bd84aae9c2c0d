import pytest

from components import bench
from components.bench import import_
from univigu.errors import ConfigError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(import_, "SECONDS", 2)
    monkeypatch.setattr(import_, "PICTURES", 1)
    import_.encode.cache_clear()
    yield
    import_.encode.cache_clear()


@pytest.mark.slow
def test_an_import_uses_all_but_the_four_bad_videos_of_a_hundred(small, tmp_path):
    import_.write_videos(tmp_path / "videos", 100, (360, 640), 2 * import_.RATE)
    found = import_.run_import(tmp_path / "videos", tmp_path / "root")
    assert (found["used"], found["of"], found["clips"]) == (96, 100, 96)
    assert found["reasons"] == {"damaged": 1, "duplicate": 1, "no_text": 1, "too_short": 1}
    assert found["memory"]["process"] > 50
    assert 0 < import_.time_encoding(tmp_path / "root") < 1000 * found["seconds"]
    assert 0 < import_.time_decoding(tmp_path / "videos") < 1000 * found["seconds"]


def test_a_benchmark_is_named_without_the_underscore_and_refuses_options_of_others(tmp_path):
    assert "import" in bench.benchmarks()
    with pytest.raises(ConfigError, match="The benchmark 'busy' has no option --videos"):
        bench.run("busy", tmp_path, videos=3)
