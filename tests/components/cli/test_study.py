"""What `univigu study` prints: the arms and their state, and one sentence for what can't be done."""

import pytest
import yaml

from components.cli import main as cli

ARMS = {
    "profile": "smoke",
    "reference": "one",
    "budgets": {"short": {"seeds": [0, 1]}},
    "arms": [
        {"name": "one", "family": "headline", "question": "How well?"},
        {"name": "two", "family": "text_draws", "question": "Do they?", "settings": {"train_stage_2.text_draws": 2}},
    ],
}


@pytest.fixture
def study(tmp_path, capfd, monkeypatch):
    """Run a command on two arms that have not run; returns its exit code, and what it printed on both streams."""
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(ARMS))

    def call(*arguments):
        where = ("--arms", str(tmp_path / "arms.yaml"), "--root", str(tmp_path))
        monkeypatch.setattr("sys.argv", ["univigu", "study", *arguments, *where])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


def test_arms_are_listed_with_question_state_and_the_steps_that_they_change(study):
    code, out, _ = study("list")
    assert code == 0
    assert [line.split(maxsplit=2) for line in out.splitlines()[::2]] == [
        ["one", "headline", "0 of 2 finished; changes no step"],
        ["two", "text_draws", "0 of 2 finished; changes train-stage-2"],
    ]
    assert [line.strip() for line in out.splitlines()[1::2]] == ["How well?", "Do they?"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "three"], "The study has no arm 'three'; its arms are one, two."),
        (["run", "--budget", "huge"], "The study has no budget 'huge'; choose one of short."),
        (["show"], "No arm of the study has finished with the budget 'short'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(study, arguments, said):
    code, out, err = study(*arguments)
    assert code in (65, 78)
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
