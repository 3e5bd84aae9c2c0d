"""The report page: scores, samples, training curves, and the counts of the data pipeline, in one HTML file.

The page is self-contained: styles, charts and clips are inline, and its content security policy forbids everything
else. The template escapes every text from data, after invisible characters are replaced by their code points. It also
draws the line charts: matplotlib's SVG would need more code to follow the page's width and its light or dark mode.
"""

import base64
import io
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEMPLATE = "report.html.j2"
RUN = "<!-- the run -->"  # where `stamp` adds what must not be in a step's output: times, the machine, links
WITHHELD = ("unsafe", "personal")  # rejected rows with these reasons are counted, but not shown
EXAMPLES_PER_REASON = 2
LONGEST_TEXT = 160
LONGEST_PREVIEW, WIDEST_PREVIEW = 24, 256  # at most so many frames and pixels of a clip on the page
WRONG = "#cf222e"  # the colour of what is wrong on the contact sheet
CARD_WIDTH = 160  # pixels; smaller clips are enlarged to it on the contact sheet

Facts = Mapping[str, Any]


def render_report(
    *,
    about: Mapping[str, str],
    scores: Facts,
    attributes: Sequence[str],
    samples: Mapping[str, Sequence[Facts]],
    charts: Mapping[str, Sequence[Facts]],
    funnel: Sequence[Facts],
    rejected: Sequence[Facts],
    notes: Sequence[str],
    confusion: Facts | None = None,
) -> str:
    """The whole page as HTML.

    about: facts about the run, by label. scores: as in scores.json. samples: results of `clip_sample`, for
    ``captions``, ``worst`` (captions), ``generation`` and ``joint``. charts: results of `line_chart`, by section.
    funnel: the result of `funnel_steps`. rejected: that of `rejected_examples`. confusion: that of
    `components.evaluation.confusion.count_confusions`. The page says so if one of them is empty.
    """
    return (
        page_templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            run=RUN,
            confusion=confusion,
            about=about,
            scores=scores,
            attributes=attributes,
            samples=samples,
            charts=charts,
            funnel=funnel,
            rejected=rejected,
            notes=notes,
        )
    )


def page_templates(folder: Path) -> Any:
    """The Jinja environment of pages whose templates are in a folder: escaped, and strict about missing values."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def stamp(page: str, facts: Mapping[str, str], links: Mapping[str, str]) -> str:
    """The page with facts about the run (date, profile, version, commit, machine) and links, both by label.

    The step's own page has neither, because the output of a step doesn't depend on the clock or the host.
    """
    text = (
        '<dl class="about">{% for label, value in facts.items() %}'
        "<div><dt>{{ label }}</dt><dd>{{ value | visible }}</dd></div>{% endfor %}</dl>\n"
        '<p class="links">{% for label, address in links.items() %}'
        '<a href="{{ address }}">{{ label }}</a>{% endfor %}</p>'
    )
    return page.replace(
        RUN, page_templates(Path(__file__).parent).from_string(text).render(facts=facts, links=links), 1
    )


def visible(text: object) -> str:
    """`text` with control, format, private-use and unassigned characters replaced by their code points."""
    return "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Cn") else char
        for char in str(text)
    )


# --- clips -----------------------------------------------------------------------------------------------------------


class Preview(NamedTuple):
    """A clip small enough for a page: uint8 (F, H, W, 3)."""

    frames: np.ndarray
    fps: float


def preview(clip: np.ndarray, fps: float) -> Preview:
    """A clip, uint8 (F, H, W, 3), of any size; if it is large, with fewer frames and pixels."""
    from PIL import Image

    step = -(-len(clip) // LONGEST_PREVIEW)
    frames, (height, width) = clip[::step], clip.shape[1:3]
    if (longest := max(height, width)) > WIDEST_PREVIEW:
        size = (width * WIDEST_PREVIEW // longest, height * WIDEST_PREVIEW // longest)
        small = [Image.fromarray(frame).resize(size, Image.Resampling.BOX) for frame in frames]
        frames = np.stack([np.asarray(frame) for frame in small])
    return Preview(frames, fps / step)


def animation(frames: np.ndarray, fps: float) -> str:
    """A clip, uint8 (F, H, W, 3), as a lossless animated WebP in a data URI."""
    from PIL import Image

    content = _webp([Image.fromarray(frame) for frame in frames], round(1000 / fps))
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def clip_sample(clips: Mapping[str, Preview], **facts: Any) -> dict[str, Any]:
    """One sample for the page: its clips as (animation, first frame) by label, and the other values that are shown."""
    shown = {label: (animation(*clip), animation(clip.frames[:1], clip.fps)) for label, clip in clips.items()}
    return {"clips": shown, **facts}


class Card(NamedTuple):
    """One sample of the contact sheet: its clip, its text, and the names of the attributes that are wrong in it."""

    clip: Preview
    text: str
    wrong: Sequence[str] = ()


def contact_sheet(groups: Mapping[str, Sequence[Card]]) -> bytes:
    """An animated WebP for the README: a row of cards under each title; all clips have the same size.

    What is wrong in a sample is named below its text, and its frame is red.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(card.clip for cards in groups.values() for card in cards)
    count, height, width, _ = first.frames.shape
    scale = max(1, CARD_WIDTH // width)
    columns = max(len(cards) for cards in groups.values())
    side, tall, gap, title_height, line_height = width * scale, height * scale, 16, 38, 16
    title_font, text_font = ImageFont.load_default(19), ImageFont.load_default(13)
    wrapped = {title: [_card_lines(card, text_font, side) for card in cards] for title, cards in groups.items()}
    heights = {title: title_height + tall + line_height * max(map(len, texts)) for title, texts in wrapped.items()}
    page = Image.new("RGB", (columns * (side + gap) + gap, sum(heights.values()) + 2 * gap), "white")
    draw = ImageDraw.Draw(page)
    places, top = [], 0
    for title, cards in groups.items():
        draw.text((gap, top + 12), title, fill="#1f2328", font=title_font)
        for column, (card, lines) in enumerate(zip(cards, wrapped[title], strict=True)):
            left = gap + column * (side + gap)
            places.append((left, top + title_height, card.clip.frames))
            box = (left - 1, top + title_height - 1, left + side, top + title_height + tall)
            draw.rectangle(box, outline=WRONG if card.wrong else "#d1d9e0")
            for number, (line, colour) in enumerate(lines):
                at = (left, top + title_height + tall + 5 + number * line_height)
                draw.text(at, line, fill=colour, font=text_font)
        top += heights[title]
    sheets = []
    for number in range(count):
        sheet = page.copy()
        for left, top, clip in places:
            sheet.paste(Image.fromarray(clip[number]).resize((side, tall), Image.Resampling.NEAREST), (left, top))
        sheets.append(sheet)
    return _webp(sheets, [round(1000 / first.fps)] * (count - 1) + [700])


def _card_lines(card: Card, font: Any, width: float) -> list[tuple[str, str]]:
    """The lines under a card's clip, each with its colour."""
    lines = [(line, "#59636e") for line in _wrap(visible(card.text) or "(empty prompt)", font, width)]
    if card.wrong:
        lines += [(line, WRONG) for line in _wrap(f"wrong: {', '.join(card.wrong)}", font, width)]
    return lines


def _wrap(text: str, font: Any, width: float) -> list[str]:
    """`text` in lines of at most `width` pixels, unless a single word is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _webp(pictures: Sequence[Any], duration: int | Sequence[int]) -> bytes:
    stream = io.BytesIO()
    first, *others = pictures
    first.save(stream, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True, method=4)
    return stream.getvalue()


# --- charts ----------------------------------------------------------------------------------------------------------


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> dict[str, Any]:
    """A line chart for the template: the points of each series and the ticks, in percent of the plot's size.

    bands: (x, low, high) around a series, by its name.
    """
    edges = [(x, y) for band in (bands or {}).values() for x, *ends in band for y in ends]
    points = [point for line in series.values() for point in line] + edges
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_ticks = find_ticks(min(*ys, 0.0), max(*ys, 1e-9), 4)
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    x_ticks = [tick for tick in find_ticks(x_low, x_high, 5) if x_low <= tick <= x_high]

    def across(x: float) -> float:
        return round(100 * (x - x_low) / (x_high - x_low), 2)

    def down(y: float) -> float:
        return round(100 - 100 * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 2)

    return {
        "title": title,
        "x_label": x_label,
        "x_ticks": [(across(tick), f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(down(tick), f"{tick:g}") for tick in y_ticks],
        "lines": [
            {
                "name": name,
                "path": " ".join(f"{across(x)},{down(y)}" for x, y in line),
                "dots": [(across(x), down(y)) for x, y in line] if len(line) <= 24 else [],
                "last": f"{line[-1][1]:.3g}",
                "band": _outline((bands or {}).get(name, ()), across, down),
            }
            for name, line in series.items()
            if line
        ],
    }


def _outline(
    band: Sequence[tuple[float, float, float]], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    """The outline of a band: along its upper edge, and back along the lower one."""
    upper = [(x, high) for x, _, high in band]
    lower = [(x, low) for x, low, _ in reversed(band)]
    return " ".join(f"{across(x)},{down(y)}" for x, y in upper + lower)


def find_ticks(low: float, high: float, intervals: int) -> list[float]:
    """Evenly spaced round numbers from at most `low` to at least `high`, about `intervals` steps apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / intervals))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * intervals >= (high - low) * 0.999)
    first, last = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)
    return [round(number * step, 12) for number in range(first, last + 1)]


# --- the data pipeline -----------------------------------------------------------------------------------------------


def funnel_steps(manifests: Sequence[Facts]) -> list[dict[str, Any]]:
    """The rows in, rows out and reasons of each step; widths are in percent of the most rows that went into a step."""
    whole = max((manifest["rows_in"] for manifest in manifests), default=0) or 1
    return [
        {
            "name": manifest["step"],
            "rows_in": manifest["rows_in"],
            "rows_out": manifest["rows_out"],
            "quarantined": manifest["quarantined"],
            "kept_width": round(100 * min(manifest["rows_out"], whole) / whole, 2),
            "lost_width": round(100 * manifest["quarantined"] / whole, 2),
            "reasons": sorted(manifest["reasons"].items(), key=lambda pair: (-pair[1], pair[0])),
        }
        for manifest in manifests
    ]


def rejected_examples(tables: Mapping[str, Iterable[Facts]]) -> list[dict[str, Any]]:
    """The first rejected rows of every step and reason; rows with a reason in `WITHHELD` are only counted."""
    reasons: dict[tuple[str, str], list[Facts]] = {}
    for step, rows in tables.items():
        for row in rows:
            reasons.setdefault((step, row["reason"]), []).append(row)
    return [
        {
            "step": step,
            "reason": reason,
            "count": len(rows),
            "examples": []
            if any(word in reason for word in WITHHELD)
            else [{"text": _row_text(row["row"]), "detail": row["detail"]} for row in rows[:EXAMPLES_PER_REASON]],
        }
        for (step, reason), rows in sorted(reasons.items())
    ]


def _row_text(row: str) -> str:
    """The readable part of a quarantined row: its prompt or text, otherwise the row itself."""
    try:
        value = json.loads(row)
    except ValueError:
        value = row
    if isinstance(value, dict):
        value = next((value[key] for key in ("text", "prompt", "raw", "line") if value.get(key) is not None), row)
    text = str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"
