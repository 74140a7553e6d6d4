"""Analysis room: one self-contained HTML report of a study, redrawn from its files alone."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from moe_rl.analysis.data.collapse import stability_frontier
from moe_rl.analysis.data.load import Study, load_study
from moe_rl.analysis.data.measures import run_measures, summarize
from moe_rl.analysis.plots.frontier import map_cells
from moe_rl.analysis.report.figures import MAP_FIGURES, SETTING_FIGURES, FigureSpec, has_map
from moe_rl.analysis.report.methods import methods_section
from moe_rl.analysis.report.narrative import config_line, headline, map_headline, pooled_fields
from moe_rl.analysis.report.page import (
    GENERATOR,
    Html,
    details,
    figure_block,
    join,
    page,
    tag,
    text,
)
from moe_rl.analysis.report.sections import (
    absent_runs,
    arms_section,
    claims_section,
    config_section,
    environment_section,
    paired_section,
    paired_tests,
    runs_section,
    verdict_matrix,
)
from moe_rl.analysis.report.svg import inline, settle, to_png, to_svg
from moe_rl.analysis.verdicts.claims import claims_table

__all__ = ["summarize", "write_report"]

CHAPTERS = 6  # above this many settings only the map is drawn, not every setting's time courses


def _remove_last_report(out: Path) -> None:
    """Remove the figures and tables of an earlier report, which may have had others.

    Nothing is removed unless the page beside them says that this function's caller wrote it.
    """
    page_file = out / "index.html"
    if not page_file.is_file() or GENERATOR not in page_file.read_text(encoding="utf-8"):
        return
    for folder, suffixes in (("figures", (".svg", ".png")), ("data", (".csv",))):
        for file in sorted((out / folder).iterdir()):
            if file.suffix in suffixes:
                file.unlink()


def write_report(run_dir: str | Path, study: Study | None = None) -> Path:
    """Draw the report of the study (or single run) in `run_dir`; returns the path of index.html.

    Writes `run_dir/report/`: index.html (inline SVG, no script, no network), figures/*.svg and
    *.png, data/*.csv. The same input files give byte for byte the same output.

    `study` is what `load_study(run_dir)` gave, where a caller has it. Raises AnalysisError for a
    folder that cannot be read (see `load_study`).
    """
    study = study or load_study(run_dir)
    out = Path(run_dir) / "report"
    for folder in ("figures", "data"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _remove_last_report(out)
    measures = run_measures(study)
    arms, claims = summarize(study, measures), claims_table(study, measures)
    tests = paired_tests(measures)
    _write_data(out / "data", study, measures, arms, claims, tests)

    mapped = has_map(study)
    chapters = [] if mapped and len(study.settings) > CHAPTERS else study.settings
    body: list[object] = [_title(study), _overview(study, measures, arms, claims, mapped, chapters)]
    if mapped:
        body.append(_map_chapter(study, measures, out))
    if len(study.settings) > 1:
        body += [_heading("verdicts", "Verdicts by setting"), _matrix(study, claims)]
    for setting in chapters:
        frames = [_of(frame, setting) for frame in (measures, arms, claims, tests)]
        body.append(_chapter(study.setting(setting), frames, out))
    body += [
        _heading("runs", "Runs that are not complete"),
        runs_section(study),
        _heading("methods", "Methods"),
        methods_section(),
        _heading("configuration", "Configuration"),
        config_section(study, chapters),
        _heading("environment", "Environment"),
        environment_section(study),
    ]
    index = out / "index.html"
    index.write_text(page(f"{study.name}: moe-rl report", join(body)), encoding="utf-8")
    return index


def _heading(anchor: str, words: str) -> Html:
    return tag("h2", words, f'id="{text(anchor)}"')


def _title(study: Study) -> Html:
    complete, found = int(study.runs["complete"].sum()), len(study.runs)
    planned = found + len(absent_runs(study))
    counted = f"{complete} of {planned} runs complete"
    made = f"; made by <code>{text(study.command)}</code>" if study.command else ""
    return Html(
        f"<header>{tag('h1', f'{study.name}: what routing did to training')}"
        f'<p class="meta">moe-rl study, mode {text(study.mode)}; {counted}{made}. '
        'Data: <a href="data/runs.csv">runs</a>, <a href="data/arms.csv">arms</a>, '
        '<a href="data/claims.csv">claims</a>, <a href="data/paired.csv">paired tests</a>.</p>'
        "</header>"
    )


def _overview(
    study: Study,
    measures: pd.DataFrame,
    arms: pd.DataFrame,
    claims: pd.DataFrame,
    mapped: bool,
    chapters: list[str],
) -> Html:
    """The headline of every chapter and of the map, links, and the verdicts of all settings."""
    parts: list[object] = []
    if mapped:
        parts.append(tag("p", map_headline(study, measures), 'class="headline"'))
    for setting in chapters:
        own = [_of(frame, setting) for frame in (measures, arms, claims)]
        parts.append(tag("p", headline(setting, *own), 'class="headline"'))
    anchors = [("map", "Map")] if mapped else []
    anchors += [(_slug(setting), setting) for setting in chapters]
    anchors += [(name, name.capitalize()) for name in ("methods", "configuration", "environment")]
    links = [tag("a", words, f'href="#{text(anchor)}"') for anchor, words in anchors]
    parts.append(tag("nav", join(links, " ")))
    return join(parts)


def _matrix(study: Study, claims: pd.DataFrame) -> Html:
    matrix = verdict_matrix(claims, study.settings)
    few = len(study.settings) <= CHAPTERS
    return matrix if few else details(f"{len(study.settings)} settings", matrix)


def _map_chapter(study: Study, measures: pd.DataFrame, out: Path) -> Html:
    """The map's figures, and a warning where its cells hold runs of several kinds."""
    parts = [_heading("map", "Map"), _figures(study, measures, MAP_FIGURES, "map", out)]
    pooled = pooled_fields(study.runs)
    if pooled:
        words = f"Cells pool runs that differ in more than the seed: {', '.join(pooled)}."
        parts.append(tag("p", words, 'class="meta"'))
    return join(parts)


def _chapter(study: Study, frames: list[pd.DataFrame], out: Path) -> Html:
    """One setting: its tables and figures."""
    setting = study.settings[0]
    measures, arms, claims, tests = frames
    slug = _slug(setting)
    judged = claims_section(claims)
    if len(study.runs) == 1:
        judged = details("one run cannot settle a claim; the table for what it would need", judged)
    return join(
        [
            _heading(slug, f"Setting: {setting}"),
            tag("p", config_line(study), 'class="meta"'),
            tag("h3", "Arms"),
            arms_section(arms),
            tag("h3", "Claims of the GSPO paper"),
            judged,
            tag("h3", "Figures"),
            _figures(study, measures, SETTING_FIGURES, slug, out),
            tag("h3", "Paired tests"),
            paired_section(tests),
        ]
    )


def _figures(
    study: Study, measures: pd.DataFrame, specs: list[FigureSpec], slug: str, out: Path
) -> Html:
    """Draw every figure the data allows, write its files, and lay them out with captions."""
    blocks: list[object] = []
    left_out = []
    config = config_line(study)
    if len(study.settings) > CHAPTERS:
        config = config.split(": ", 1)[-1]
    for spec in specs:
        missing = spec.missing(study)
        if missing:
            left_out.append(f"{spec.title} (no {', '.join(missing)})")
            continue
        name = f"{slug}-{spec.key}"
        drawings = []
        for index, width in enumerate(spec.widths):
            figure = settle(spec.draw(study, measures, width))
            svg = to_svg(figure)
            if index == 0:
                (out / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")
                (out / "figures" / f"{name}.png").write_bytes(to_png(figure))
            drawings.append(inline(svg, f"{name}-{index}", spec.title))
        blocks.append(
            figure_block(
                drawings, spec.title, spec.caption, config, f"figures/{name}",
                half=len(spec.widths) == 1,
            )
        )  # fmt: skip
    parts: list[object] = [Html(f'<div class="figures">\n{join(blocks)}\n</div>')]
    if left_out:
        words = f"Not drawn, because no run recorded it: {'; '.join(left_out)}."
        parts.append(tag("p", words, 'class="meta"'))
    return join(parts)


def _write_data(
    folder: Path,
    study: Study,
    measures: pd.DataFrame,
    arms: pd.DataFrame,
    claims: pd.DataFrame,
    tests: pd.DataFrame,
) -> None:
    frames = {"runs": measures, "arms": arms, "claims": claims, "paired": tests}
    if has_map(study):
        done = measures[measures["complete"]]
        frames |= {"map": map_cells(measures), "frontier": stability_frontier(done)}
    else:
        # A map's would be hundreds of megabytes, and they are in the run folders anyhow.
        frames |= {"steps": study.steps, "updates": study.updates}
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.8g")


def _of(frame: pd.DataFrame, setting: str) -> pd.DataFrame:
    return frame[frame["setting"] == setting]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "setting"
