import numpy as np
import pytest

from components import bench
from components.bench import import_
from univigu.clip_formats import encode_clip
from univigu.errors import BadInputError, ConfigError, MissingInputError, UniViGUError, VideoError
from univigu.video import encode_mp4


@pytest.mark.slow
def test_an_import_uses_all_but_the_four_bad_videos_of_a_hundred(tmp_path):
    import_.write_videos(tmp_path / "videos", 100, [import_.encode(0, 2 * import_.RATE)])
    found = import_.run_import(tmp_path / "videos", tmp_path / "root")
    assert (found["used"], found["of"], found["clips"]) == (96, 100, 96)
    assert found["reasons"] == {"damaged": 1, "duplicate": 1, "no_text": 1, "too_short": 1}
    assert found["memory"]["process"] > 50
    assert 0 < import_.time_decoding(tmp_path / "videos") < 1000 * found["seconds"]


def test_a_benchmark_is_named_without_the_underscore_and_refuses_options_of_others(tmp_path):
    assert "import" in bench.benchmarks()
    with pytest.raises(ConfigError, match="The benchmark 'busy' has no option --videos"):
        bench.run("busy", tmp_path, videos=3)


@pytest.mark.slow
def test_copies_of_ones_own_video_are_imported_in_place_of_made_ones(tmp_path):
    (tmp_path / "own.mp4").write_bytes(import_.encode(1, 2 * import_.RATE))
    report = bench.run("import", tmp_path, videos=20, video=tmp_path / "own.mp4")
    assert (report["videos"], report["clips"]) == ({"used": 20, "of": 20, "because": {}}, 20)
    assert report["kilobytes"] == round((tmp_path / "own.mp4").stat().st_size / 1000)
    assert (tmp_path / "reports/bench-import.json").exists()


def test_an_import_that_uses_none_of_the_videos_says_why_in_one_sentence(tmp_path):
    (tmp_path / "wide.mp4").write_bytes(encode_mp4(np.zeros((20, 32, 192, 3), np.uint8), 8))
    with pytest.raises(UniViGUError, match=r"rejected 1 of 1 rows.*aspect") as refused:
        bench.run("import", tmp_path, videos=1, video=tmp_path / "wide.mp4")
    assert "Traceback" not in str(refused.value)


def test_a_video_that_can_not_be_copied_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(MissingInputError, match="no video file"):
        bench.run("import", tmp_path, video=tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="check that it is whole"):
        bench.run("import", tmp_path, video=tmp_path / "text.mp4")
    (tmp_path / "own.webm").write_bytes(encode_clip(np.zeros((9, 32, 32, 3), np.uint8), 8, ".webm"))
    with pytest.raises(BadInputError, match="is no mp4"):
        bench.run("import", tmp_path, video=tmp_path / "own.webm")
    assert not (tmp_path / "reports").exists()
