"""Registered models as the studio shows them, and changes of champion with the checks and ledger of the commands."""

from collections.abc import Callable
from typing import Any, NamedTuple

from components.cli.models import read_versions
from components.cli.studio.work import Studio, explain
from components.registry import ledger, promotion, votes
from components.registry.evaluations import HEADLINES, read_evaluation
from components.registry.lineage import trace_version
from components.tracking import actor, existing_store, store_to_read
from univigu import registry
from univigu.errors import BadInputError, BusyError
from univigu.mlflow_store import opened

LINES = 30  # of the history that a page shows
LONGEST_WHY = 500  # characters of a reason or a name: MLflow's params have a limit


class Champions(NamedTuple):
    """The versions with the aliases `champion` and `previous` when a page was shown; 0 for none."""

    champion: int
    previous: int


def list_names(studio: Studio) -> list[str]:
    """The registered models, the one that was asked for first. Raises `MissingInputError` if there is no registry."""
    with studio.store:
        store = existing_store(studio.root, "register one with `univigu run register-model`")
        with opened(store):
            from mlflow import MlflowClient

            found = sorted(one.name for one in MlflowClient().search_registered_models(max_results=100))
    return [*([studio.name] if studio.name in found else []), *(name for name in found if name != studio.name)]


def list_versions(studio: Studio, name: str) -> list[dict[str, Any]]:
    with studio.store:
        return read_versions(name, studio.root)


def champions(studio: Studio, name: str) -> Champions:
    """Who is champion now, and who was before."""
    with studio.store:
        store = existing_store(studio.root)
        found = [registry.version_at(name, alias, store) for alias in (registry.CHAMPION, registry.PREVIOUS)]
    return Champions(*(int(one.version) if one else 0 for one in found))


def describe(studio: Studio, name: str, version: int) -> dict[str, Any]:
    """A version's scores, comparison, votes and origins; where one can't be read, its error in words."""
    with studio.store:
        return {
            "scores": _or_error(lambda: _scores(studio, name, version)),
            "comparison": _or_error(lambda: promotion.compare(name, version, root=studio.root)),
            "votes": _or_error(lambda: votes.count(name, version, studio.root)),
            "trace": _or_error(lambda: trace_version(name, version, studio.root)),
        }


def read_history(studio: Studio, name: str) -> list[ledger.Entry]:
    """The newest decisions about a model."""
    with studio.store:
        return promotion.history(name, root=studio.root)[:LINES]


def promote(studio: Studio, name: str, version: int, why: str, person: str, force: bool, seen: Champions) -> str:
    """Make a version champion as `univigu model promote` does; returns what was decided, in a sentence."""
    why, who = _read_reason(why, person)
    with studio.store:
        _require_unchanged(studio, name, seen)
        line = promotion.promote_if_better(name, version, why, who=who, force=force, root=studio.root)
    if line.outcome == ledger.REFUSED:
        raise BadInputError(
            f"Version {line.version} was not promoted: {line.reason}. The history records this. To promote it anyway, "
            "choose 'even if it is not better', and give the reason."
        )
    return _describe_line(line)


def roll_back(studio: Studio, name: str, why: str, person: str, seen: Champions) -> str:
    """Swap champion and previous champion as `univigu model rollback` does; returns what was done, in a sentence."""
    why, who = _read_reason(why, person)
    with studio.store:
        _require_unchanged(studio, name, seen)
        return _describe_line(promotion.rollback(name, why, who=who, root=studio.root))


def _describe_line(line: ledger.Entry) -> str:
    state = "is still" if line.outcome == ledger.UNCHANGED else "is now"
    was = f", instead of version {line.replaced}" if line.replaced and line.outcome != ledger.UNCHANGED else ""
    return f"Version {line.version} {state} champion{was}{', by force' if line.forced else ''}: {line.reason}."


def _read_reason(why: str, person: str) -> tuple[str, str]:
    """The reason, and who decides: the person who is named in the page, as this process's user says."""
    why, person = why.strip(), " ".join(person.split())
    if not why:
        raise BadInputError("A change of champion needs a reason for the history; write one in the field 'Reason'.")
    if max(len(why), len(person)) > LONGEST_WHY:
        raise BadInputError(f"A reason and a name have at most {LONGEST_WHY} characters each; say it in fewer.")
    return why, f"{person}, says {actor()}" if person else ""


def _require_unchanged(studio: Studio, name: str, seen: Champions) -> None:
    now = champions(studio, name)
    if now != seen:
        raise BusyError(
            f"Nothing was changed, because the champion changed after this page was shown: it was {_named(seen)}, and "
            f"is {_named(now)}. The page shows it now; decide again."
        )


def _named(known: Champions) -> str:
    champion = f"version {known.champion}" if known.champion else "unset"
    return champion + (f" (before it version {known.previous})" if known.previous else "")


def _scores(studio: Studio, name: str, version: int) -> dict[str, list[tuple[str, Any]]]:
    """Scores with their intervals by their dotted names: the `headlines`, and `all`."""
    store = store_to_read(studio.root)
    found = read_evaluation(registry.artifact(f"models:/{name}/{version}", "evaluation", store)).scores
    return {"headlines": [(key, found[key]) for key in HEADLINES if key in found], "all": sorted(found.items())}


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        return explain(error)
