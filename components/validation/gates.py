"""Great Expectations as a gate: a suite built in code and run on a table in memory, with proof that all of it ran.

Great Expectations fails open: an expectation that raises is one `success: false` among many, an empty table passes
every row-wise expectation, and an expectation that never ran is not reported. `run_gate` treats each of these as a
failure. The `meta` of an expectation decides about the rows that fail it: with a `reason` they are quarantined under
it, without one the step fails. Of rows that violate uniqueness, the first stays if it passes everything else. After a
quarantine the whole suite runs again, so the rows that leave a gate have passed all of it.

The HTML pages (Data Docs) are written outside the committed output, because they contain times and random ids. The
committed `validation.json` has the same figures.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.pipeline.lean_imports import import_expectations
from components.validation.data_docs import finish_docs
from univigu.errors import GateFailedError

UNIQUE = ("expect_column_values_to_be_unique", "expect_compound_columns_to_be_unique")
Reject = Callable[[str | None, str, str], None]  # called with a row's id (None if it has none), a reason and a detail


@dataclass
class Gate:
    """The result of a suite: the rows that passed all of it, and the figures of each expectation."""

    passed: Any  # pandas.DataFrame
    report: list[dict[str, Any]]


def expectations() -> Any:
    """Great Expectations' module of expectations, imported with telemetry switched off."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import_expectations()
    import great_expectations.expectations as expectations_module

    return expectations_module


def run_gate(
    name: str, frame: Any, suite: Sequence[Any], docs: Path, min_rows: int, remedy: str, reject: Reject
) -> Gate:
    """Run `suite` on a DataFrame with a unique column `id`; calls `reject` for every row that fails.

    Raises `GateFailedError`, whose message ends with `remedy`, if the table has fewer than `min_rows` rows before or
    after the quarantine, if an expectation without a `reason` fails, and if one raised, was not run, or did not see
    every row. By then `reject` was called for the failing rows. `docs`, whose name is that of the table, is replaced by
    the pages of the run on the whole table.
    """
    shutil.rmtree(docs, ignore_errors=True)
    if not suite:
        raise GateFailedError(f"The gate '{name}' has no expectations, so it validates nothing; {remedy}.")
    _require_rows(name, frame, min_rows, "has", remedy)
    results, write_docs = _validate(name, frame, suite, docs)
    write_docs()
    report = sorted((_figures(result) for result in results), key=lambda figures: figures["expectation"])
    finish_docs(docs, name, len(frame), report)
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


def find_reasons(name: str, frame: Any, suite: Sequence[Any]) -> dict[str | None, tuple[str, str]]:
    """The reason and detail of each row that `run_gate` would quarantine, by the row's id; nothing is written.

    What the suite requires of the table as a whole is not examined.
    """
    rowwise = [expectation for expectation in suite if (expectation.meta or {}).get("reason")]
    results, _ = _validate(name, frame, rowwise, Path(name))
    found: dict[str | None, tuple[str, str]] = {}

    def note(row_id: str | None, reason: str, detail: str) -> None:
        found[row_id] = (reason, detail)

    _reject_rows([result for result in results if not result.success], frame, note)
    return found


def _reject_rows(failed: Sequence[Any], frame: Any, reject: Reject) -> dict[str | None, list[tuple[str, str]]]:
    """Call `reject` for every failing row; returns the (reason, detail) pairs of each by id.

    The reason is the expectation's type if it has no `reason` of its own.
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
    return value if isinstance(value, str) else None  # pandas has NaN for a missing id


def _all_but_first(
    alike: Mapping[str | None, Sequence[tuple[str, str]]], order: Sequence[str | None]
) -> Iterator[tuple[str | None, list[tuple[str, str]]]]:
    """The rows of `alike` that share a finding with an earlier row that stays, with these findings."""
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
            f"The gate '{name}' failed: its table {verb} {len(frame)} rows, fewer than the required "
            f"{max(min_rows, 1)}; {remedy}."
        )


def _validate(name: str, frame: Any, suite: Sequence[Any], docs: Path) -> tuple[list[Any], Callable[[], Any]]:
    """Run the suite in an ephemeral context; returns the results, and a function that writes the HTML pages."""
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
    table = docs.name
    source = context.data_sources.add_pandas("uni-vigu")
    batches = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe(table)
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
    run = gx.RunIdentifier(run_name=table)
    (outcome,) = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=run).run_results.values()
    order = [_signature(expectation.configuration) for expectation in suite]
    results = sorted(
        outcome.results,
        key=lambda result: order.index(signature) if (signature := _describe(result)) in order else len(order),
    )
    return results, lambda: context.build_data_docs(site_names=["docs"])


def _check_that_all_ran(name: str, suite: Sequence[Any], results: Sequence[Any], rows: int, remedy: str) -> None:
    """Raise `GateFailedError` unless every expectation of the suite ran without an exception and saw all rows."""
    wanted = Counter(_signature(expectation.configuration) for expectation in suite)
    ran = Counter(_signature(result.expectation_config) for result in results)
    missing = next(iter((wanted - ran) + (ran - wanted)), None)
    if missing:
        raise GateFailedError(f"The gate '{name}' failed: {missing} was not run as often as it should; {remedy}.")
    for result in results:
        raised = _exception(result.exception_info or {})
        if raised is not None:
            raise GateFailedError(f"The gate '{name}' failed: {_describe(result)} raised '{raised}'; {remedy}.")
        count = result.result.get("element_count", rows)
        if count != rows:
            raise GateFailedError(
                f"The gate '{name}' failed: {_describe(result)} saw {count} of {rows} rows; {remedy}."
            )


def _exception(info: Mapping[str, Any]) -> str | None:
    """The message of an expectation's exception, or None; `info` is one record, or one per metric."""
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
    """A summary of a failed result for an error message."""
    if "observed_value" in result:
        return f"observed {result['observed_value']}"
    some = ", ".join(str(value) for value in result.get("partial_unexpected_list", [])[:3])
    return f"{result.get('unexpected_count', 0)} of {result.get('element_count', 0)} rows, such as {some}"


def _counts(reasons: Mapping[Any, Sequence[tuple[str, str]]]) -> str:
    counts = Counter(found[0][0] for found in reasons.values())
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _figures(result: Any) -> dict[str, Any]:
    """The figures of a result in the committed report, without times or random ids."""
    return {
        "expectation": _describe(result),
        "success": bool(result.success),
        "rows": result.result.get("element_count"),
        "unexpected": result.result.get("unexpected_count"),
        "reason": _reason(result),
    }
