"""Small steps to try the engine with: what they leave, how often they worked, a run in another process."""

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

from components.pipeline import runner
from components.pipeline.stages import Stage

PROFILE = {"double": {"factor": 2, "max_rejected_share": 0.5}, "source": "numbers.json"}
FIRST = Stage(
    "first",
    "steps_under_test:double",
    home="data/first",
    sources={"raw": "source"},
    parameters=("double",),
    sharded=True,
)
SECOND = Stage(
    "second",
    "steps_under_test:copy",
    home="data/second",
    outputs=("captions.parquet",),
    inputs={"first": "first"},
    parameters=("double",),
)
BATCHES = replace(FIRST, name="batches", function="steps_under_test:batches", home="data/batches")
MODULE = """
import json, os, tempfile, time
from pathlib import Path

def double(step):
    numbers = json.loads(step.inputs["raw"].read_text())
    step.rows_in = len(numbers)
    if os.environ.get("DIE"):
        with step.temporary_files():
            tempfile.mkstemp(prefix="left-")
            os._exit(9)

    def work(rows, folder):
        if os.environ.get("SLOW"):
            Path(os.environ["SLOW"]).write_text(str(rows[0]["n"]))
            time.sleep(0.5)
        good = [row for row in rows if row["n"] >= 0]
        for row in rows:
            if row["n"] < 0:
                step.reject(str(row["n"]), "negative", "below zero", row)
        data = bytes(row["n"] * step.parameters["double"]["factor"] % 256 for row in good)
        (folder / "data.bin").write_bytes(data)
        with open(step.previous.parents[1] / "made.log", "a") as log:
            log.write(f"{rows[0]['n']} ")
        factor = step.parameters["double"]["factor"]
        return [{"clip_id": f"{row['n']:03d}", "text": str(row["n"] * factor)} for row in good]

    step.write("captions", step.map_shards([{"n": n} for n in numbers], 4, work))

def batches(step):
    def work(rows, folder):
        def batch_work(batch, place):
            if os.environ.get("SLOW"):
                Path(os.environ["SLOW"]).write_text(str(batch[0]["n"]))
                time.sleep(0.5)
            (place / "data.bin").write_bytes(bytes(row["n"] for row in batch))
            with open(step.previous.parents[1] / "made.log", "a") as log:
                log.write(f"{batch[0]['n']} ")
            if batch[0]["n"] == 2:
                step.reject("2", "two", "is never used")
            return [{"clip_id": f"{row['n']:03d}"} for row in batch if row["n"] != 2]

        made = step.map_batches(rows, 2, folder, batch_work)
        (folder / "data.bin").write_bytes(b"".join((place / "data.bin").read_bytes() for place, _ in made))
        return [row for _, rows in made for row in rows]

    numbers = json.loads(step.inputs["raw"].read_text())
    step.rows_in = len(numbers)
    step.write("captions", step.map_shards([{"n": n} for n in numbers], 5, work, group=lambda row: row["n"] < 7))

def copy(step):
    rows = step.read("first", "captions").to_pylist()
    step.rows_in = len(rows)
    if os.environ.get("FAIL"):
        raise OSError(int(os.environ["FAIL"]), "no room")
    step.write("captions", rows)
"""


def run(root, name="first", profile=PROFILE):
    return runner.run_stage(name, profile, root)


def snapshot(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made(root):
    log = root / "made.log"
    shards = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return shards


def start(root, part=None, step="first", **env):
    arguments = f"{step!r}, {PROFILE!r}, root"
    run = f"run_part({arguments}, runner.Part.parse({part!r}))" if part else f"run_stage({arguments})"
    code = f"""
        import sys
        sys.path.insert(0, {str(root)!r})
        from pathlib import Path
        from components.pipeline import runner, stages
        from components.pipeline.stages import Stage
        root = Path({str(root)!r})
        stages.STAGES = ({FIRST!r}, {BATCHES!r})
        runner.{run}
    """
    code = code.replace("resources=Resources", "resources=stages.Resources")
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **env})


def wait_for(path, text):
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < deadline, f"{path} never said {text}"
        time.sleep(0.02)
