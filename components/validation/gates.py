"""Great Expectations as a gate: a suite built in code, run on a table in memory, and trusted only when it really ran.

Great Expectations fails open: an expectation that raised is one `success: false` among many, an empty table passes
every row-wise expectation, and one that was never run is not missed. `run_gate` closes these doors. Each expectation
says in its `meta` what happens to the rows that fail it: they are quarantined under its `reason`, or (without one) the
step fails. Of rows that must not be alike, the first in the table stays, if nothing else is wrong with it. After a
quarantine the whole suite runs again: what leaves a gate has passed all of it.

Its pages (Data Docs) are written for people, outside the committed output: they carry times and random ids. Opened in
a browser they ask a public CDN for style sheets and scripts, and show the logo of Great Expectations; the committed
`validation.json` says the same without either.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univigu.errors import GateFailedError

UNIQUE = ("expect_column_values_to_be_unique", "expect_compound_columns_to_be_unique")
Reject = Callable[[str | None, str, str], None]  # takes a row's id, if it has one, a reason and a detail


@dataclass
class Gate:
    """What came of a suite: the rows that passed all of it, and each expectation's figures."""

    passed: Any  # pandas.DataFrame
    report: list[dict[str, Any]]


def expectations() -> Any:
    """Great Expectations' module of expectations, imported with everything that would call home switched off."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations.expectations as expectations_module

    return expectations_module


def run_gate(
    name: str, frame: Any, suite: Sequence[Any], docs: Path, min_rows: int, remedy: str, reject: Reject
) -> Gate:
    """Run `suite` on a DataFrame with a unique column `id`; returns what passed, and gives `reject` every other row.

    Raises `GateFailedError`, which ends with `remedy`, where the table has fewer than `min_rows` rows before or after
    the quarantine, where an expectation without a `reason` fails, and where one raised, was not run, or did not look
    at every row. The failing rows have been given to `reject` by then. `docs` is replaced by the pages of the run that
    saw the whole table.
    """
    shutil.rmtree(docs, ignore_errors=True)
    if not suite:
        raise GateFailedError(f"The gate '{name}' expects nothing of its table, so it can't vouch for it; {remedy}.")
    _require_rows(name, frame, min_rows, "holds", remedy)
    results, write_docs = _validate(name, frame, suite, docs)
    write_docs()
    report = sorted((_figures(result) for result in results), key=lambda figures: figures["expectation"])
    _check_that_all_ran(name, suite, results, len(frame), remedy)
    failed = [result for result in results if not result.success]
    reasons = _reject_rows(failed, frame, reject)
    for result in failed:
        if not _reason(result) or not result.result.get("unexpected_index_list"):
            raise GateFailedError(
                f"The gate '{name}' failed: {_describe(result)} does not hold ({_seen(result.result)}); {remedy}."
            )
    if not failed:
        return Gate(frame, report)
    bad = frame["id"].isin(list(reasons))
    left = frame[~bad].reset_index(drop=True)
    _require_rows(name, left, min_rows, f"keeps (of {len(frame)}: {_counts(reasons)})", remedy)
    again, _ = _validate(name, left, suite, docs)
    _check_that_all_ran(name, suite, again, len(left), remedy)
    for result in again:
        if not result.success:
            raise GateFailedError(
                f"The gate '{name}' failed: without the {bad.sum()} rows it quarantined ({_counts(reasons)}), "
                f"{_describe(result)} does not hold ({_seen(result.result)}); {remedy}."
            )
    return Gate(left, report)


def _reject_rows(failed: Sequence[Any], frame: Any, reject: Reject) -> dict[str | None, list[tuple[str, str]]]:
    """Give every row that is quarantined to `reject`; returns each one's (reason, detail) by id.

    Where the expectation fails the whole step, its type is the reason.
    """
    reasons: dict[str | None, list[tuple[str, str]]] = {}
    alike: dict[str | None, list[tuple[str, str]]] = {}
    for result in failed:
        reason = _reason(result)
        keep_one = reason and result.expectation_config.type in UNIQUE
        for row in result.result.get("unexpected_index_list") or ():
            seen = ", ".join(f"{key} {value}" for key, value in row.items() if key != "id")
            found = (reason or result.expectation_config.type, f"{seen}: {_describe(result)}")
            (alike if keep_one else reasons).setdefault(_row_id(row["id"]), []).append(found)
    for row_id, found in _all_but_first(alike, [_row_id(row_id) for row_id in frame["id"] if row_id not in reasons]):
        reasons[row_id] = found
    for row_id, found in reasons.items():
        reject(row_id, found[0][0], "; ".join(detail for _, detail in found))
    return reasons


def _row_id(value: Any) -> str | None:
    return value if isinstance(value, str) else None  # pandas has a NaN for it


def _all_but_first(
    alike: Mapping[str | None, Sequence[tuple[str, str]]], order: Sequence[str | None]
) -> Iterator[tuple[str | None, list[tuple[str, str]]]]:
    """The rows that are like an earlier one of those that stay; rows are alike where they have a finding in common."""
    taken: set[tuple[str, str]] = set()
    for row_id in (row_id for row_id in order if row_id in alike):
        found = [finding for finding in alike[row_id] if finding in taken]
        if found:
            yield row_id, found
        else:
            taken.update(alike[row_id])


def _require_rows(name: str, frame: Any, min_rows: int, verb: str, remedy: str) -> None:
    if len(frame) < max(min_rows, 1):
        raise GateFailedError(
            f"The gate '{name}' failed: its table {verb} {len(frame)} rows, fewer than the profile's "
            f"{max(min_rows, 1)}; {remedy}."
        )


def _validate(name: str, frame: Any, suite: Sequence[Any], docs: Path) -> tuple[list[Any], Callable[[], Any]]:
    """Run the suite in an ephemeral context; returns a result for each expectation that ran, and what writes pages."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.data_context.types import base

    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
    }
    config = base.DataContextConfig(
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={"docs": site},
        progress_bars=base.ProgressBarsConfig(globally=False, metric_calculations=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=config)
    batches = (
        context.data_sources.add_pandas("memory").add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
    )
    named = context.suites.add(gx.ExpectationSuite(name))
    for expectation in suite:
        named.add_expectation(expectation.copy(deep=True))
    validation = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batches, suite=named))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=name,
            validation_definitions=[validation],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
        )
    )
    (outcome,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    order = [_signature(expectation.configuration) for expectation in suite]
    results = sorted(
        outcome.results,
        key=lambda result: order.index(signature) if (signature := _describe(result)) in order else len(order),
    )
    return results, lambda: context.build_data_docs(site_names=["docs"])


def _check_that_all_ran(name: str, suite: Sequence[Any], results: Sequence[Any], rows: int, remedy: str) -> None:
    """Hold the results against the suite: every expectation there, none raised, and all rows looked at."""
    wanted = Counter(_signature(expectation.configuration) for expectation in suite)
    ran = Counter(_signature(result.expectation_config) for result in results)
    missing = next(iter((wanted - ran) + (ran - wanted)), None)
    if missing:
        raise GateFailedError(f"The gate '{name}' failed: {missing} was asked for and not run; {remedy}.")
    for result in results:
        raised = _exception(result.exception_info or {})
        if raised is not None:
            raise GateFailedError(f"The gate '{name}' failed: {_describe(result)} raised '{raised}'; {remedy}.")
        count = result.result.get("element_count", rows)
        if count != rows:
            raise GateFailedError(
                f"The gate '{name}' failed: {_describe(result)} looked at {count} of {rows} rows; {remedy}."
            )


def _exception(info: Mapping[str, Any]) -> str | None:
    """The message of an expectation's exception; there is one record, or one for each metric that raised."""
    records = [info] if "raised_exception" in info else list(info.values())
    for record in records:
        if record.get("raised_exception"):
            return str(record.get("exception_message") or "an exception").strip().splitlines()[0]
    return None


def _signature(configuration: Any) -> str:
    """An expectation's type and arguments, as text."""
    arguments = {key: value for key, value in configuration.kwargs.items() if key != "batch_id" and value is not None}
    shown = ", ".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))
    return f"{configuration.type}({shown})"


def _reason(result: Any) -> str | None:
    return (result.expectation_config.meta or {}).get("reason")


def _describe(result: Any) -> str:
    return _signature(result.expectation_config)


def _seen(result: Mapping[str, Any]) -> str:
    """The few figures of a failed result that tell a person what was wrong."""
    if "observed_value" in result:
        return f"observed {result['observed_value']}"
    some = ", ".join(str(value) for value in result.get("partial_unexpected_list", [])[:3])
    return f"{result.get('unexpected_count', 0)} of {result.get('element_count', 0)} rows, such as {some}"


def _counts(reasons: Mapping[Any, Sequence[tuple[str, str]]]) -> str:
    counts = Counter(found[0][0] for found in reasons.values())
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _figures(result: Any) -> dict[str, Any]:
    """What the committed report keeps of a result: nothing that depends on the clock or on chance."""
    return {
        "expectation": _describe(result),
        "success": bool(result.success),
        "rows": result.result.get("element_count"),
        "unexpected": result.result.get("unexpected_count"),
        "reason": _reason(result),
    }
