"""Figures as files, and as SVG that lives inside the page and follows its theme.

`inline` turns a standalone SVG into a fragment: no XML head, no metadata, every id under a prefix
of its own, and the figure's colours replaced by CSS variables, so that one drawing serves the
light and the dark page. Both forms are functions of the drawing alone: no dates, no random ids.
"""

import io
import re
from html import escape
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moe_rl.analysis.plots.style import DARK_PARTNERS, styled

PNG_DPI = 200


def variable(colour: str) -> str:
    """The CSS variable that stands for one of the figures' colours."""
    return f"var(--f-{colour.lstrip('#')})"


def css_variables(*, dark: bool) -> str:
    """The declarations of every such variable for one theme."""
    return " ".join(
        f"--f-{light.lstrip('#')}: {partner if dark else light};"
        for light, partner in DARK_PARTNERS.items()
    )


@styled
def settle(figure: Figure) -> Figure:
    """Compute the layout once and keep it, so that saving as PNG and SVG does not repeat it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


# The canvases' own print methods, because `savefig` draws every figure twice.
@styled
def to_svg(figure: Figure) -> str:
    """The figure as a standalone SVG document without a date."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


@styled
def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 200 dots per inch, without software or date in it."""
    buffer = io.BytesIO()
    figure.set_dpi(PNG_DPI)
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_figures(folder: Path, drawn: list[tuple[str, str, Figure]]) -> list[dict[str, str]]:
    """Write figures, each (key, title, figure), as SVG and PNG; returns them for a page.

    Each has key, title and svg, the fragment to put into the page.
    """
    return [
        {"key": key, "title": title, "svg": save_figure(folder, key, title, figure)}
        for key, title, figure in drawn
    ]


def save_figure(folder: Path, key: str, title: str, figure: Figure) -> str:
    """Write a figure as KEY.svg and KEY.png; returns the fragment to put into a page."""
    folder.mkdir(parents=True, exist_ok=True)
    settle(figure)
    svg = to_svg(figure)
    (folder / f"{key}.svg").write_text(svg, encoding="utf-8")
    (folder / f"{key}.png").write_bytes(to_png(figure))
    return inline(svg, key, title)


def inline(svg: str, prefix: str, title: str) -> str:
    """An SVG document as a fragment for an HTML page; `prefix` must be unique on the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bhref="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    for light in DARK_PARTNERS:
        body = body.replace(light, variable(light))
    body = body.replace("'DejaVu Sans'", "var(--figure-font)")
    body = re.sub(r'\bd="[^"]*"', _short_numbers, body)
    body = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", body, count=1)
    head = f'<svg role="img" aria-label="{escape(title, quote=True)}"'
    return body.replace("<svg", head, 1).strip()


def _short_numbers(match: re.Match[str]) -> str:
    """Path coordinates to a hundredth of a point: half the size, nothing to see."""
    return re.sub(r"(\.\d{2})\d+", r"\1", match.group(0))
