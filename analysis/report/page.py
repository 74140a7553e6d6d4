"""Numbers as the report prints them, and the templates that make its page.

One file, no script, no network: the style sheet is `report.css` pasted in, figures are inline SVG.
The templates escape everything that comes from a file.
"""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moe_rl.analysis.data import collapse, stats
from moe_rl.analysis.report.svg import css_variables, variable
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.claims import CLAIMS
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, MIN_SEEDS, NOT_REPRODUCED, REPRODUCED
from moe_rl.experiments.arms import find_arm

NONE = "\u2013"  # an en dash stands for "no number"

GENERATOR = '<meta name="generator" content="moe-rl report">'
"""Marks a page as ours, so that a new report may replace it."""

# Verdict -> CSS class and mark: never by colour alone.
MARKS = {
    REPRODUCED: ("yes", "\u2713"),
    NOT_REPRODUCED: ("no", "\u2717"),
    INCONCLUSIVE: ("open", "?"),
}


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table: `digits` decimals, powers of ten where those would hide it."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "infinite"
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


def render(context: dict[str, Any], template: str = "report.html.j2") -> str:
    """The whole page: the template filled with `context`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {"number": number, "share": share, "css_variable": variable}
    environment.globals |= {
        "bounds": bounds, "find_arm": find_arm, "css_variables": css_variables, "zip": zip,
        "NONE": NONE, "MARKS": MARKS, "GENERATOR": GENERATOR, "CLAIMS": CLAIMS,
        "MIN_SEEDS": MIN_SEEDS, "collapse": collapse, "stats": stats, "rules": rules,
    }  # fmt: skip
    return environment.get_template(template).render(context)
