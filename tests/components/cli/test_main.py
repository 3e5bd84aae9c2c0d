"""What `univigu run`, `univigu status` and `univigu code` say and do, as a person or DVC calls them."""

import inspect
import json
import logging
import re
import sys
from functools import partial

import pytest
import typer
import yaml

from components.cli import main as cli
from components.pipeline import processes, profiles, stages
from components.pipeline.aside import list_kept
from components.settings import layers
from engine import PROFILE, made
from univigu.errors import BadInputError


def read_profile(root, spec):
    """The profile of the steps under test, which has none of the real sections."""
    values = yaml.safe_load((root / "profile.yaml").read_text())
    for key, value in layers.split_spec(spec)[1].items():
        values = layers.set_value(values, key.split("."), value)
    return values


@pytest.fixture
def univigu(root, capfd, monkeypatch):
    """Run a command below the work root; returns its exit code, and what it printed on both streams."""
    monkeypatch.setattr(profiles, "load_profile", partial(read_profile, root))
    monkeypatch.setattr(profiles, "check_watched", lambda *_: None)
    (root / "profile.yaml").write_text(yaml.safe_dump(PROFILE))

    def call(*arguments):
        monkeypatch.setenv("UNIVIGU_QUIET", "0")  # `--quiet` changes it
        monkeypatch.setattr("sys.argv", ["univigu", *arguments, "--root", str(root)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


def change_parameter(root):
    changed = {**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}}
    (root / "profile.yaml").write_text(yaml.safe_dump(changed))


def test_a_fresh_start_and_a_way_back_are_one_option_each(univigu, root):
    assert univigu("run", "first") == (0, "first: 12 rows in, 12 out, 0 quarantined\n", "")
    assert made(root) == ["0", "4", "8"]
    assert univigu("run", "first")[0] == 0
    assert made(root) == []
    code, _, said = univigu("run", "first", "--restart")
    (place,) = list_kept(root)
    assert (code, made(root)) == (0, ["0", "4", "8"])
    assert str(place) in said
    assert univigu("run", "first", "--resume-from", str(place))[0] == 0
    assert made(root) == []


def test_where_there_is_nothing_to_go_on_from_it_is_said_in_one_sentence(univigu, root):
    code, out, said = univigu("run", "first", "--resume-from", str(root / "nowhere"))
    assert (code, out) == (66, "")
    assert said == f"univigu: {root}/nowhere holds no work of 'first' to resume; none of its work is set aside.\n"


def test_a_part_has_no_fresh_start_of_its_own(univigu):
    code, _, said = univigu("run", "first", "--part", "1/2", "--restart")
    assert code == 78
    assert "run the whole step" in said


def test_status_says_what_is_finished_what_would_start_again_and_what_is_set_aside(univigu, root):
    univigu("run", "first")
    change_parameter(root)
    code, out, _ = univigu("status")
    assert code == 0
    assert out.splitlines()[0].split(maxsplit=1) == ["first", "would start again: double.factor (2 -> 3)"]
    assert out.splitlines()[1].split(maxsplit=1) == ["second", "has not run"]
    univigu("run", "first")
    assert univigu("status")[1].splitlines()[-1].split()[-1] == str(list_kept(root)[0])


def test_a_step_is_run_with_settings_of_the_command_line_and_status_compares_with_them(univigu, root):
    assert univigu("run", "first", "--set", "double.factor=3")[0] == 0
    assert univigu("status")[1].splitlines()[0].endswith("would start again: double.factor (3 -> 2)")
    assert univigu("status", "--set", "double.factor=3")[1].splitlines()[0].split() == ["first", "finished"]


def test_settings_reach_the_processes_that_make_a_step_in_parts(univigu, root, monkeypatch):
    given = []
    monkeypatch.setattr(processes, "make_parts", lambda *arguments: given.append(arguments))
    univigu("run", "first", "--set", "double.factor=3", "--processes", "2")
    assert given == [("first", 'tiny {"double.factor": 3}', root, 2)]


def test_dvc_is_told_at_once_that_a_step_is_finished(univigu, root, monkeypatch):
    univigu("run", "first")
    made(root)
    (root / ".univigu/shards/first/00000.json").unlink()
    monkeypatch.setenv("DVC_STAGE", "first")
    code, out, _ = univigu("run", "first")
    assert (code, out) == (0, "first: already finished with the same inputs, parameters and code\n")
    assert made(root) == []
    change_parameter(root)
    univigu("run", "first")
    assert made(root) == ["0", "4", "8"]


def test_the_code_and_the_settings_of_each_step_are_written_for_dvc(univigu, root):
    def written():
        return {path.stem: json.loads(path.read_text()) for path in (root / ".univigu/steps").iterdir()}

    assert univigu("code")[0] == 0
    before = written()
    assert set(before) == {stage.name for stage in stages.STAGES}
    for stage in stages.STAGES:
        keys = (*stage.sources.values(), *stage.parameters)
        assert before[stage.name]["settings"] == {key: PROFILE[key] for key in keys}
    path = root / "steps_under_test.py"
    path.write_text(path.read_text().replace("def copy", "# a comment\ndef copy"))
    univigu("code")
    assert written() == before
    path.write_text(path.read_text().replace("% 256", "% 255"))
    univigu("code")
    after = written()
    assert {name for name in before if after[name] != before[name]} == {"first"}
    assert after["first"]["settings"] == before["first"]["settings"]


def test_quiet_prints_errors_and_results_alone_whatever_a_step_prints(univigu, root, monkeypatch):
    def talk(step):
        print("a line of a step", file=sys.stderr)
        raise BadInputError("The prompts are damaged; restore them.")

    monkeypatch.setattr("components.pipeline.runner.load_function", lambda stage: talk)
    code, out, err = univigu("run", "first")
    assert (code, out) == (65, "")
    assert "a line of a step" in err
    assert univigu("--quiet", "run", "first") == (65, "", "univigu: The prompts are damaged; restore them.\n")


# Commands that take less than two seconds with a work root of the profile `tiny`, or print line by line what they do.
QUICK = {
    *("steps", "use", "status", "clean", "code", "summary", "metrics", "studio", "serve"),
    *("profile list", "profile show", "profile diff", "profile schema", "profile reference"),
    *("pipeline compile", "pipeline submit", "pipeline status", "pipeline cancel", "pipeline logs"),
    *("study list", "data list"),
}
SAYS = re.compile(r"\b(activity|progress|say|load|show)\(")
# What shows progress itself: a step of the pipeline, a training, or Kubeflow's tasks.
STEPS = re.compile(r"\b(run_stage|import_folder|run_locally|run_study|run_train_job|pretrain|export_clips)\(")


def test_a_command_that_takes_long_says_what_it_does():
    def commands(group, prefix=""):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{name} ")
            else:
                yield f"{prefix}{name}", inspect.getsource(command.callback)

    found = dict(commands(typer.main.get_command(cli.app)))
    silent = {name for name, source in found.items() if not SAYS.search(source) and not STEPS.search(source)}
    assert silent <= QUICK, "show what they do with `activity` or `progress`, or list them as quick"
    assert found.keys() >= QUICK


def test_a_library_that_logs_a_traceback_is_not_heard(capfd, monkeypatch):
    for name in ("UNIVIGU_VERBOSE", "TQDM_DISABLE", "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    try:
        cli.keep_libraries_quiet()
        logging.getLogger("a library").error("it failed", exc_info=OSError(28, "No space left on device"))
    finally:
        logging.disable(logging.NOTSET)
    assert capfd.readouterr().err == ""
