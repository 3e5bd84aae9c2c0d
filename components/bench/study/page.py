"""The study as one HTML file, ``reports/study.html``: the answer, all arms with their intervals, curves and samples.

It is self-contained, makes no request, and escapes every text from data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.bench.study.arms import FAMILIES
from components.bench.study.results import COMPARED, Evaluated, Report
from components.bench.study.shown import Shown
from components.evaluation.report import line_chart, page_templates

PAGE = Path("reports/study.html")
TEMPLATE = "study.html.j2"
TITLES = {
    "headline": "The recipe",
    "prior": "What the generator's knowledge brings",
    "stages": "Stages and prompt dropout",
    "literal": "The paper's literal recipe",
    "attention": "Attention",
    "ffn_t": "The text's feed-forward layers",
    "text_draws": "Text draws per pass over the video",
    "video_tokens": "Video tokens",
    "joint": "Joint sampling",
    "retention": "What is kept of generation",
    "cost": "Accuracy and cost",
    "generalisation": "Generalisation",
    "stories": "Stories",
}


def write_page(report: Report, evaluated: Sequence[Evaluated], shown: Shown, root: Path) -> Path:
    """Write the page of a report; returns its path."""
    path = root / PAGE
    path.write_text(render_page(report, evaluated, shown), encoding="utf-8")
    return path


def render_page(report: Report, evaluated: Sequence[Evaluated], shown: Shown = Shown()) -> str:  # noqa: B008 (immutable)
    """The page as HTML; `evaluated` are the arms whose learning curves it shows."""
    arms, probes = report["about"]["arms"], report["about"]["probes"]
    return (
        page_templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            about=report["about"],
            answer=answer(report),
            sections=[
                {
                    "family": family,
                    "title": TITLES[family],
                    "arms": [(name, arms[name], scores) for name, scores in report[family].items() if name in arms],
                    "probes": [
                        (name, probes[name], scores) for name, scores in report[family].items() if name in probes
                    ],
                    "with_videos": any("seconds_per_video" in scores for scores in report[family].values()),
                    "chart": learning_curves(family, report["about"]["reference"], evaluated),
                    "steps": [(name, one) for name, scores in report[family].items() if (one := by_steps(scores))],
                }
                for family in FAMILIES
                if family in report
            ],
            compared=COMPARED,
            shown=shown,
            failures=[(name, seed, why) for name, arm in arms.items() for seed, why in sorted(arm["failures"].items())],
            missing=[name for name, arm in arms.items() if not arm["seeds"] and not arm["failures"]]
            + [name for name, probe in probes.items() if not probe["seeds"]],
        )
    )


def answer(report: Report) -> list[str]:
    """Sentences that say what the prior changes, with its interval, whichever way it falls."""
    reference = report["about"]["reference"]
    ours = next((arms[reference] for arms in _families(report) if reference in arms), None)
    arms = report["about"]["arms"]
    sentences = []
    for name, figures in report.get("prior", {}).items():
        if arms[name]["weights"] != "random" or "captions.difference" not in figures or not ours:
            continue
        gap = figures["captions.difference"]
        sentences.append(
            f"Captions are right in {_percent(ours['captions'])} of the attributes if training starts from the "
            f"pretrained generator, and in {_percent(figures['captions'])} if it starts from random weights ({name}): "
            + judge({"value": -gap["value"], "low": -gap["high"], "high": -gap["low"]}, "the generator's knowledge")
        )
    return sentences or ["This study has not compared a pretrained generator with random weights."]


def judge(gain: Mapping[str, float], what: str) -> str:
    """Whether a difference of shares is shown by its interval, in words."""
    if gain["low"] <= 0 <= gain["high"]:
        return f"no effect of {what} is shown, because the interval of the difference, {_points(gain)}, includes 0."
    return f"{what} {'adds' if gain['low'] > 0 else 'costs'} {_points(gain)}."


def learning_curves(family: str, reference: str, evaluated: Sequence[Evaluated]) -> Mapping[str, Any] | None:
    """The token accuracy on held-out pairs by step, of the family's arms and the reference; None without an arm.

    A line is the mean over seeds; if there are several, its band is from the lowest to the highest.
    """
    lines, bands = {}, {}
    if not any(one.arm.family == family for one in evaluated):
        return None
    for one in evaluated:
        if one.arm.family != family and one.arm.name != reference:
            continue
        by_step: dict[int, list[float]] = {}
        for curve in one.curves.values():
            for step, value in curve:
                by_step.setdefault(step, []).append(value)
        if by_step:
            lines[one.arm.name] = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
        if by_step and len(one.curves) > 1:
            bands[one.arm.name] = [(step, min(values), max(values)) for step, values in sorted(by_step.items())]
    title = "Share of held-out tokens right, during stage 2"
    return line_chart(title, "step", lines, bands) if lines else None


def _families(report: Report) -> list[Mapping[str, Any]]:
    return [report[family] for family in FAMILIES if family in report]


def by_steps(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Captions by the number of Euler steps, fewest first, and then until the model was sure; [] without either.

    Each has its ``label``, the ``captions``, and, where they were measured, ``seconds`` and ``operations`` per caption.
    """
    ways = {
        name.removeprefix("captions"): name for name in figures if name.startswith(("captions_in_", "captions_until"))
    }
    rows = []
    for way, name in sorted(ways.items(), key=lambda pair: (not pair[0].startswith("_in_"), _count(pair[0]))):
        taken = figures.get(f"steps_per_caption{way}")
        row = {
            "label": f"{_count(way)}" if taken is None else f"until sure: {taken['value']:.1f} on average",
            "captions": figures[name],
            "seconds": figures.get(f"seconds_per_caption{way}"),
            "operations": figures.get(f"operations_per_caption{way}"),
        }
        rows.append(row)
    return rows


def _count(way: str) -> int:
    """4 of ``_in_4_steps``; 0 of another text."""
    digits = "".join(letter for letter in way if letter.isdigit())
    return int(digits or 0)


def _percent(score: Mapping[str, float]) -> str:
    return f"{100 * score['value']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _points(gain: Mapping[str, float]) -> str:
    value, low, high = (abs(gain[key]) if gain["high"] < 0 else gain[key] for key in ("value", "low", "high"))
    return f"{100 * value:.1f} points ({100 * min(low, high):.1f} to {100 * max(low, high):.1f})"
