"""The declared arms and probes of a study, and the profile that each arm runs with.

An arm is the study's profile with some settings changed, in sections that only training and evaluation read: all arms
share one set of data. Settings are named ``section.key``; ``train_stage_*.key`` is both training stages. A probe is an
evaluation of an arm's finished model on other clips, or with other steps: it trains nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES, find_stage
from univigu.errors import ConfigError
from univigu.files import read_yaml

DECLARED = Path(__file__).with_name("arms.yaml")
STEPS = ("train-stage-1", "train-stage-2", "evaluate-model")  # what an arm runs
DATA = tuple(stage.name for stage in STAGES[: [stage.name for stage in STAGES].index(STEPS[0])])  # what all share
BOTH = "train_stage_*"

Budget = Literal["short", "full"]
Family = Literal[
    "headline",
    "prior",
    "stages",
    "literal",
    "attention",
    "ffn_t",
    "text_draws",
    "video_tokens",
    "joint",
    "retention",
    "cost",
    "generalisation",
    "stories",
]
FAMILIES: tuple[str, ...] = get_args(Family)  # the sections of the report
Settings = dict[str, Any]
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]*$", max_length=40)]
Block = dict[str, Annotated[list[str], Field(min_length=1)]]  # values by attribute: the scenes with one of each


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Arm(_Declared):
    """One training with its evaluation."""

    name: Name
    family: Family  # the section of the report that it is for
    question: Annotated[str, Field(min_length=1)]
    settings: Settings = {}
    short: Settings = {}  # more settings, with this budget
    full: Settings = {}
    budgets: list[Budget] = ["short", "full"]  # those that it is part of
    weights: Literal["base", "random"] = "base"  # random: the base's transformer is initialised anew
    left_out: Block = {}  # pairs whose prompt or caption states this are kept out of its training


class Probe(_Declared):
    """One evaluation of an arm's finished model, on captions of held-out items, which trains nothing."""

    name: Name
    family: Family
    question: Annotated[str, Field(min_length=1)]
    of: str = ""  # the arm; "" is the reference
    against: str = ""  # the probe whose captions of the same scenes its own are compared with
    # heldout: the clips of the evaluation. seen: the same scenes in handwriting that models were trained on. redrawn:
    # other scenes from another seed, in held-out handwriting.
    clips: Literal["heldout", "seen", "redrawn"] = "heldout"
    only: Block = {}  # redrawn scenes have one of these values of each attribute
    frames: Annotated[int, Field(ge=1, le=81)] | None = None  # fewer: taken evenly; more: the last frame stays
    size: Annotated[int, Field(ge=8, le=256)] | None = None  # pixels of each side, to which clips are resampled
    steps: list[Annotated[int, Field(ge=1, le=1000)]] = []  # also in each of these numbers of Euler steps
    entropy: Annotated[float, Field(gt=0)] | None = None  # also with a stop at this mean entropy of a token, in nats
    videos: Annotated[int, Field(ge=0, le=100)] = 0  # videos that are generated to measure their cost
    budgets: list[Budget] = ["short", "full"]

    def changes(self) -> Settings:
        """What it sets, without its names, for a report."""
        left_out = {"name", "family", "question", "budgets"}
        return self.model_dump(exclude=left_out, exclude_defaults=True)


class Plan(_Declared):
    """What a budget gives to every arm."""

    seeds: Annotated[list[int], Field(min_length=1)]
    settings: Settings = {}


class Study(_Declared):
    """All arms. Later settings replace earlier ones: those of the study, the budget, the arm, the arm's budget."""

    profile: str  # a bundled profile's name, or the path of a YAML file, relative to the study's file
    reference: str  # the arm that the others are compared with
    settings: Settings = {}
    budgets: dict[Budget, Plan]
    arms: Annotated[list[Arm], Field(min_length=1)]
    probes: list[Probe] = []

    def find(self, name: str) -> Arm:
        """The arm called `name`; raises `ConfigError` that lists all names."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError(f"The study has no arm '{name}'; its arms are {', '.join(arm.name for arm in self.arms)}.")

    def chosen(self, budget: str, names: list[str] | None = None) -> list[Arm]:
        """The arms of a budget, or those of `names`, in the declared order; raises `ConfigError` for another name."""
        self.plan(budget)
        wanted = {self.find(name).name for name in names or ()}
        arms = [arm for arm in self.arms if budget in arm.budgets and (not wanted or arm.name in wanted)]
        if missing := wanted - {arm.name for arm in arms}:
            raise ConfigError(f"With the budget '{budget}' the study has no arm '{sorted(missing)[0]}'; use the other.")
        return arms

    def probes_of(self, arm: Arm, budget: str) -> list[Probe]:
        """The probes of an arm's model with a budget, in the declared order."""
        return [one for one in self.probes if budget in one.budgets and (one.of or self.reference) == arm.name]

    def plan(self, budget: str) -> Plan:
        """What the budget gives; raises `ConfigError` where the study has no such budget."""
        for name, plan in self.budgets.items():
            if name == budget:
                return plan
        raise ConfigError(f"The study has no budget '{budget}'; choose one of {', '.join(self.budgets)}.")


def load_study(path: Path = DECLARED) -> Study:
    """Read the file that declares the arms; raises `ConfigError` that names what is wrong in it, and where."""
    try:
        values = read_yaml(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no study {path}; check the path.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"The study {path} is not readable YAML ({error}); correct it.") from error
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"The study {path} is not valid: {place}: {first['msg']}; correct it.") from error
    if Path(study.profile).suffix in {".yaml", ".yml"}:
        study = study.model_copy(update={"profile": str((path.parent / study.profile).resolve())})
    _check_names(study, path)
    return study


def _check_names(study: Study, path: Path) -> None:
    arms, probes = [arm.name for arm in study.arms], [probe.name for probe in study.probes]
    names = [*arms, *probes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        what = "two arms" if arms.count(twice[0]) > 1 else "two arms or probes"
        raise ConfigError(f"The study {path} has {what} called '{twice[0]}'; rename one.")
    study.find(study.reference)
    for probe in study.probes:
        study.find(probe.of or study.reference)
        if probe.against and probe.against not in probes:
            raise ConfigError(f"The probe '{probe.name}' is against '{probe.against}', which is no probe of {path}.")
        if probe.only and probe.clips != "redrawn":
            raise ConfigError(f"The probe '{probe.name}' has `only`, which needs `clips: redrawn`; correct {path}.")


def data_profile(study: Study) -> dict[str, Any]:
    """The profile of the shared data, as its file holds it."""
    return {"extends": study.profile, **_nested(study.settings)}


def arm_profile(study: Study, arm: Arm, budget: str, seed: int, base: str) -> dict[str, Any]:
    """The profile of one training, as its file holds it; base: the path of the pretrained base in a work root.

    Raises `ConfigError` if the arm or the budget changes a setting that decides the shared data.
    """
    own = {**study.plan(budget).settings, **arm.settings, **getattr(arm, budget)}
    allowed = _own_sections()
    for key in own:
        if key.partition(".")[0] not in {*allowed, BOTH}:
            raise ConfigError(
                f"The arm '{arm.name}' changes {key}, but all arms share their data; change only {', '.join(allowed)}."
            )
    base = random_base(base, seed) if arm.weights == "random" else base
    return {"extends": study.profile, **_nested({**study.settings, **own}), "seed": seed, "base": base}


def random_base(base: str, seed: int) -> str:
    """The path of the base with random weights that a training with this seed starts from."""
    return f"{base}-random-{seed}"


def changed_steps(study: Study, arm: Arm, budget: str) -> list[str]:
    """The steps whose settings differ from those of the reference arm with the same budget and seed."""
    reference = study.find(study.reference)
    ours, theirs = (_flat({**one.settings, **getattr(one, budget)}) for one in (arm, reference))
    keys = {key for key in {**ours, **theirs} if (key in ours, ours.get(key)) != (key in theirs, theirs.get(key))}
    changed = {key.partition(".")[0] for key in keys}
    changed |= {"base"} if arm.weights == "random" else set()
    changed |= {"train_stage_1", "train_stage_2"} if arm.left_out else set()
    return [name for name in STEPS if changed & {*find_stage(name).parameters, *(find_stage(name).sources.values())}]


def check_arms(study: Study, budget: str, arms: list[Arm]) -> None:
    """Raise `ConfigError` for a setting that no profile may have, before anything runs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"
        base = load_profile(str(write_profile(path, data_profile(study))))["base"]
        for arm in arms:
            write_profile(path, arm_profile(study, arm, budget, 0, base))
            try:
                load_profile(str(path))
            except ConfigError as error:
                raise ConfigError(f"The arm '{arm.name}': {str(error).replace(f'{path}: ', '')}") from error


def write_profile(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a profile's file; returns its path."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _own_sections() -> list[str]:
    """The sections that only the steps of an arm read."""
    shared = {section for name in DATA for section in find_stage(name).parameters}
    return sorted({section for name in STEPS for section in find_stage(name).parameters} - shared)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with both training stages written out."""
    return {one: value for key, value in settings.items() for one in _written_out(key)}


def _written_out(key: str) -> Iterator[str]:
    if key.startswith(f"{BOTH}."):
        yield from (key.replace(BOTH, f"train_stage_{number}", 1) for number in (1, 2))
    else:
        yield key


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    values: dict[str, Any] = {}
    for key, value in _flat(settings).items():
        *tables, last = key.split(".")
        inner = values
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[last] = value
    return values
