"""Analysis room: the HTML of the report: escaping, tables, figures, the page around them.

One file, no script, no network: the style sheet is `report.css` pasted in, figures are inline SVG.
Everything that comes from a file goes through `text`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from moe_rl.analysis.arms import arm_label
from moe_rl.analysis.plots.style import colour
from moe_rl.analysis.report.svg import css_variables, variable
from moe_rl.analysis.verdicts.verdicts import NOT_REPRODUCED, REPRODUCED

NONE = "\u2013"  # an en dash stands for "no number"

GENERATOR = '<meta name="generator" content="moe-rl report">'
"""Marks a page as ours, so that a new report may replace it."""


class Html(str):
    """A string that is already HTML; every other value is escaped where it is printed."""

    __slots__ = ()


def text(value: object) -> str:
    """`value` as HTML: escaped unless it is `Html` already."""
    return value if isinstance(value, Html) else escape(str(value), quote=True)


def tag(name: str, content: object, attributes: str = "") -> Html:
    """One element around `content`; `attributes` is HTML already."""
    return Html(f"<{name}{' ' if attributes else ''}{attributes}>{text(content)}</{name}>")


def join(parts: Sequence[object], between: str = "\n") -> Html:
    """HTML parts one after the other."""
    return Html(between.join(text(part) for part in parts))


def number(value: float, digits: int = 2) -> str:
    """A number for a table: `digits` decimals, powers of ten where those would hide it."""
    if value is None or not math.isfinite(value):
        return NONE if value is None or math.isnan(value) else "infinite"
    if value == 0 or 10**-digits <= abs(value) < 1e4:
        return f"{value:.{digits}f}".replace("-", "\u2212")
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "\u2212")


def share(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    if not math.isfinite(value):
        return NONE
    small = digits and 0 < abs(value) < 0.5 * 10 ** -(digits + 2)
    return f"{100 * value:.2g}%" if small else f"{100 * value:.{digits}f}%"


def bounds(low: float, high: float, digits: int = 2) -> str:
    """An interval in brackets; nothing where it has no bounds."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    # The larger bound says how fine the scale is: a bound near 0 is 0 on it.
    if max(abs(low), abs(high)) >= 10**-digits:
        low, high = round(low, digits) + 0.0, round(high, digits) + 0.0
    return f"[{number(low, digits)}, {number(high, digits)}]"


def arm_name(arm: str) -> Html:
    """The arm's label behind a chip of its colour."""
    chip = tag("span", "", f'class="chip" style="background: {variable(colour(arm))}"')
    return Html(f'<span class="arm">{chip}{text(arm_label(arm))}</span>')


def verdict_badge(verdict: str, *, short: bool = False) -> Html:
    """The verdict as a mark and a word; never by colour alone."""
    kind, mark = {
        REPRODUCED: ("yes", "\u2713"),
        NOT_REPRODUCED: ("no", "\u2717"),
    }.get(verdict, ("open", "?"))
    words = mark if short else f"{mark} {verdict}"
    attributes = f'class="verdict {kind}" title="{text(verdict)}"'
    return tag("span", words, attributes)


@dataclass(frozen=True)
class Column:
    """A table column: heading, whether it holds numbers, and a note on what it is."""

    name: str
    numeric: bool = False
    note: str = ""


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, kind: str = "") -> Html:
    """A table; with kind "cards" each row becomes a card on a narrow screen."""
    head = "".join(
        tag(
            "th", c.name, f'scope="col" class="{"num" if c.numeric else ""}" title="{text(c.note)}"'
        )
        for c in columns
    )
    body = []
    for row in rows:
        cells = "".join(
            tag(
                "td",
                tag("div", cell),
                f'class="{"num" if c.numeric else ""}" data-label="{text(c.name)}"',
            )
            for c, cell in zip(columns, row, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"
    return Html(f'<div class="scroll"><table class="{kind}">{inner}</table></div>')


def details(summary: object, content: object) -> Html:
    """A part that opens on a click, without script."""
    return Html(f"<details><summary>{text(summary)}</summary>\n{text(content)}\n</details>")


def figure_block(
    drawings: Sequence[str], title: str, caption: str, config: str, files: str, *, half: bool
) -> Html:
    """A figure: the drawing for wide screens, one for narrow ones where given, and its caption."""
    classes = ["only-wide", "only-narrow"] if len(drawings) == 2 else [""]
    shown = "\n".join(
        f'<div class="drawing {name}">{drawing}</div>'
        for name, drawing in zip(classes, drawings, strict=True)
    )
    links = f'<a href="{text(files)}.svg">SVG</a> <a href="{text(files)}.png">PNG</a>'
    words = (
        f"<figcaption><b>{text(title)}.</b> {text(caption)} "
        f'<span class="config">{text(config)} {links}</span></figcaption>'
    )
    return Html(f'<figure class="{"half" if half else "full"}">\n{shown}\n{words}\n</figure>')


def page(title: str, body: object) -> str:
    """The whole document."""
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    themes = (
        f":root {{ {css_variables(dark=False)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{GENERATOR}\n"
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{themes}\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{text(body)}\n</main>\n</body>\n</html>\n"
    )
