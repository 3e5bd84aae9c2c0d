"""`python -m tests.chaos`: break everything for a while, and write what came of it; or repeat one trial."""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos import shim

if TYPE_CHECKING:
    from tests.chaos import fuzz, trials

LOG = Path(".univigu/chaos.jsonl")
SEED = 2026


def main() -> None:
    options = _parser().parse_args()
    shared = Path("/dev/shm")  # memory, where there is such a thing: nothing here has to outlast the machine
    base = shared if shared.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=base))  # a TemporaryDirectory would go when a fork ends
    try:
        options.act(options, folder)
    finally:
        shutil.rmtree(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    commands = parser.add_subparsers(required=True)
    everything = commands.add_parser("all", help="all trials that fit into the time; what the log has is not repeated")
    everything.add_argument("--minutes", type=float, default=30)
    everything.add_argument("--log", type=Path, default=LOG)
    everything.add_argument("--report", type=Path, default=Path("reports/chaos.json"))
    everything.add_argument("--plan", action="append", default=[], help="only this plan; may be given again")
    everything.set_defaults(act=_all)
    one = commands.add_parser("one", help="one trial, and what it came to")
    one.add_argument("plan")
    one.add_argument("--fault", action="append", required=True, metavar="KIND:N", help=", ".join(shim.KINDS))
    one.set_defaults(act=_one)
    odd = commands.add_parser("fuzz", help="odd inputs at what reads them; all of them, or one again")
    odd.add_argument("--log", type=Path, default=LOG)
    odd.add_argument("--target", default="")
    odd.add_argument("--inputs", type=int, default=0, help="of each target (default: a full run's)")
    odd.add_argument("--number", type=int, help="only this input, in this process: with its traceback")
    odd.set_defaults(act=_fuzz)
    sample = commands.add_parser(
        "sample", help="a few trials of each plan, and a few odd inputs: what `make test` runs"
    )
    sample.add_argument("--plan", action="append", default=[], help="this plan and those that it needs")
    sample.add_argument("--each", type=int, default=2, help="trials of each plan")
    sample.add_argument("--inputs", type=int, default=50, help="odd inputs of each kind")
    sample.set_defaults(act=_sample)
    return parser


def _all(options: argparse.Namespace, folder: Path) -> None:
    from tests.chaos import fuzz, report, trials
    from tests.chaos.schedule import schedule

    started = time.monotonic()
    if not options.plan:
        for target in fuzz.targets():
            _fuzz_one(target, target.inputs, options.log, folder)
    bench = trials.set_up(folder, options.plan)
    log = [line for line in report.read_log(options.log) if "key" in line]
    known = {line["key"] for line in log if not line["findings"]}
    failed = [  # first, also those that the schedule lacks by now
        _trial(line["repeat"]) for line in log if line["findings"] and line["kind"] != "another folder"
    ]
    wanted = [*failed, *(one for one in schedule(bench, SEED) if one not in failed)]
    wanted = [(name, faults) for name, faults in wanted if not options.plan or name in options.plan]
    chained = [name for name, stage in bench.stages.items() if stage.plan.chained]
    if not options.plan and report.key(chained[0], ()) not in known:
        for trial in trials.elsewhere(bench, chained):
            _note(trial, options.log, 0.0)
    for name, faults in wanted:
        if report.key(name, faults) in known:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        began = time.monotonic()
        _note(trials.attempt(bench, name, faults), options.log, time.monotonic() - began)
    found = report.summarise(report.read_log(options.log), len(wanted), SEED)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("kills", "faults", "inputs", "seconds")}))
    sys.exit(bool(found["findings"]))


def _note(trial: "trials.Trial", log: Path, seconds: float) -> None:
    from tests.chaos import report

    report.note(log, report.of_trial(trial, seconds))
    if trial.findings:
        print(report.command(trial), trial.hit, *trial.findings, sep="\n  ", flush=True)


def _one(options: argparse.Namespace, folder: Path) -> None:
    from tests.chaos import trials

    bench = trials.set_up(folder, [options.plan])
    trial = trials.attempt(bench, options.plan, _faults(options))
    print(trial.hit, *(trial.findings or ["all is well"]), sep="\n  ")
    sys.exit(bool(trial.findings))


def _trial(repeat: str) -> tuple[str, tuple[shim.Fault, ...]]:
    """The plan and the faults of the command that repeats a trial."""
    options = _parser().parse_args(shlex.split(repeat)[3:])
    return options.plan, _faults(options)


def _faults(options: argparse.Namespace) -> tuple[shim.Fault, ...]:
    asked = (text.rpartition(":") for text in options.fault)
    return tuple(shim.KINDS[kind]._replace(n=int(n)) for kind, _, n in asked)


def _fuzz(options: argparse.Namespace, folder: Path) -> None:
    from tests.chaos import fuzz

    for target in fuzz.targets():
        if options.target in ("", target.name):
            if options.number is not None:
                fuzz.repeat(target, SEED, options.number, folder)
            else:
                _fuzz_one(target, options.inputs or target.inputs, options.log, folder)


def _fuzz_one(target: "fuzz.Target", count: int, log: Path, folder: Path) -> None:
    """Read what the log doesn't have of a target's inputs, and note it there."""
    from tests.chaos import fuzz, report

    done = sum(line["inputs"] for line in report.read_log(log) if line.get("fuzzed") == target.name)
    if done >= count:
        return
    began = time.monotonic()
    found = list(fuzz.fuzz(target, SEED, done, count - done, folder / "fuzz"))
    line = report.of_fuzzing(target.name, count - done, found, time.monotonic() - began)
    report.note(log, line)
    print(json.dumps(line), flush=True)


def _sample(options: argparse.Namespace, folder: Path) -> None:
    from tests.chaos import fuzz, report, schedule, trials

    log = folder / "log.jsonl"
    for target in fuzz.targets():
        _fuzz_one(target, options.inputs, log, folder)
    bench = trials.set_up(folder, options.plan)
    wanted = schedule.stratified(bench, SEED, options.each)
    for name, faults in wanted:
        _note(trials.attempt(bench, name, faults), log, 0.0)
    print(json.dumps(report.summarise(report.read_log(log), len(wanted), SEED)))


if __name__ == "__main__":
    shim.preload()
    main()
