"""Good inputs of every kind that is read, small, and what reads them."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file

from components.captions.captioners.client.answers import read_response
from components.captions.captioners.client.replies import Refused, Retryable, Unusable, decode_reply, read_reply
from components.clips.archive import read_tar as read_tar_members
from components.clips.archive import write_tar
from components.pipeline import manifests, profiles, shard_records
from components.prompts.sources import read_batches
from univigu import weight_files
from univigu.files import file_sha256, write_json
from univigu.training import checkpoints
from univigu.training.data import open_shard
from univigu.video import probe_video, sample_video
from univigu.video import read_video as read_frames

_CONTAINERS = {  # an ending and its codec
    "mp4": "libx264",
    "mov": "mpeg4",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "flv": "flv",
    "ts": "mpeg2video",
    "mpg": "mpeg1video",
    "gif": "gif",
}
VIDEOS = tuple(f"video.{ending}" for ending in _CONTAINERS)
CHECKPOINT_NOTES = (
    "checkpoints/latest",
    "checkpoints/step-00000001/manifest.json",
    "checkpoints/step-00000001/loop.json",
)
_PROMPTS = [
    {"text": f"a red {digit} moves up", "source": "a test", "licence": "CC0-1.0"}
    for digit in ("one", "two", "six", "ü")
]
_ANSWER = {
    "id": "1",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A red one moves up."}}
    ],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
}


def make(folder: Path) -> None:
    """Fill a folder with them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.yaml").write_text(yaml.safe_dump(profiles.load_profile("smoke"), sort_keys=False))
    lines = "".join(json.dumps(row) + "\n" for row in _PROMPTS)
    (folder / "prompts.jsonl").write_text(lines)
    (folder / "prompts.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    table = "text,source,licence\n" + "".join(f'"{row["text"]}",{row["source"]},CC0-1.0\n' for row in _PROMPTS)
    (folder / "prompts.csv").write_text(table)
    pq.write_table(pa.Table.from_pylist(_PROMPTS), folder / "prompts.parquet")
    for ending, codec in _CONTAINERS.items():
        (folder / f"video.{ending}").write_bytes(_video(ending, codec))
    write_tar(folder / "shard.tar", {f"{number:05d}.mp4": bytes([number]) * 300 for number in range(3)})
    _make_output(folder / "output")
    shard_records.write_record(
        folder / "record.json", {"of": "1", "run": "2", "key": "3", "files": {}, "rows": [{"id": "1"}]}
    )
    _make_checkpoint(folder / "checkpoints/step-00000001")
    _make_latents(folder)
    (folder / "weights").mkdir(exist_ok=True)
    save_file({"a.weight": torch.ones(4, 3), "b.weight": torch.zeros(2)}, folder / "weights/model.safetensors")
    (folder / "answer.json").write_text(json.dumps(_ANSWER))


def read_profile(path: Path) -> Any:
    return profiles.load_profile(str(path))


def read_prompts(path: Path) -> Any:
    return list(read_batches(path, {}))


def read_video(path: Path) -> Any:
    facts = probe_video(path)
    sample_video(path, [0.0, facts.last / 2, facts.last], 32, 32)
    return read_frames(path)


def read_tar(path: Path) -> Any:
    return list(read_tar_members(path))


def read_output(path: Path) -> Any:
    return manifests.verify(path.parent, "curate-prompts")


def read_record(path: Path) -> Any:
    return shard_records.read_record(path)


def read_checkpoint(path: Path) -> Any:
    return checkpoints.newest_valid(next(folder for folder in path.parents if folder.name == "checkpoints"))


def read_latents(path: Path) -> Any:
    return open_shard(path)


def read_weights(path: Path) -> Any:
    return weight_files.read_headers(path.parent, "model")


def read_answer(path: Path) -> Any:
    """As the client does: what it makes of a reply are three exceptions of its own."""
    try:
        return read_response(
            read_reply(200, {}, decode_reply(path.read_bytes(), "")), {"prompt": 1.0, "completion": 2.0}
        )
    except (Retryable, Refused, Unusable):
        return None


def _video(ending: str, codec: str) -> bytes:
    target = io.BytesIO()
    format_name = {"ts": "mpegts", "mpg": "mpeg", "mkv": "matroska"}.get(ending, ending)
    with av.open(target, "w", format=format_name) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(6):
            level = np.full((48, 64, 3), 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def _make_output(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "table.bin").write_bytes(b"a table")
    facts = {"step": "curate-prompts", "digest": "1", "rows_in": 1, "facts": {}, "parameters": {"seed": 0}}
    manifests.write_manifest(folder, {**facts, "files": manifests.describe_files(folder)})


def _make_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "loop.json", {"step": 1, "generators": [{}]})
    file = folder / "loop.json"
    described = {"loop.json": {"size": file.stat().st_size, "sha256": file_sha256(file)}}
    write_json(folder / "manifest.json", {"step": 1, "files": described})
    write_json(folder.parent / "latest", {"checkpoint": folder.name, "step": 1})


def _make_latents(folder: Path) -> None:
    states = [torch.ones(2, 8), torch.ones(3, 8)]
    tensors = {
        "latents": torch.zeros(2, 4, 3, 4, 4),
        "prompt_embeds": torch.cat(states),
        "prompt_lengths": torch.tensor([2, 3]),
        "prompt_ids": torch.ones(2, 8, dtype=torch.int64),
        "target_ids": torch.ones(2, 8, dtype=torch.int64),
    }
    save_file(tensors, folder / "latents.safetensors")
