"""One self-contained HTML report of a study, redrawn from its files alone."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.analysis.data.collapse import stability_frontier
from moe_rl.analysis.data.load import StudyRuns, load_study
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.plots.frontier import map_cells
from moe_rl.analysis.plots.style import lead_arms
from moe_rl.analysis.report import sections
from moe_rl.analysis.report.figures import (
    MAP_FIGURES,
    SETTING_FIGURES,
    STUDY_FIGURES,
    TWIST_FIGURE,
    FigureSpec,
    has_map,
    measure_figures,
)
from moe_rl.analysis.report.first_page import answers, committed_answers, twist_setting, twist_words
from moe_rl.analysis.report.narrative import config_line, headline, map_headline, pooled_fields
from moe_rl.analysis.report.page import GENERATOR, render
from moe_rl.analysis.report.svg import save_figure
from moe_rl.analysis.report.tables import study_tables, write_tables

PANELS = 9  # settings in one figure
CHAPTERS = 6  # above this many settings only the map is drawn, not every setting's time courses


def write_report(
    run_dir: str | Path,
    study: StudyRuns | None = None,
    measures: pd.DataFrame | None = None,
) -> Path:
    """Draw the report of the study (or single run) in `run_dir`; returns the path of index.html.

    Writes `run_dir/report/`: index.html (inline SVG, no script, no network), figures/*.svg and
    *.png, data/*.csv. The same input files give byte for byte the same output.

    `study` is what `load_study(run_dir)` gave and `measures` are `run_measures(study)`, where a
    caller has them. Raises AnalysisError for a folder that cannot be read (see `load_study`).
    """
    study = study or load_study(run_dir)
    out = Path(run_dir) / "report"
    for folder in ("figures", "data"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _remove_last_report(out)
    measures = run_measures(study) if measures is None else measures
    tables = study_tables(study, measures)
    write_tables(out / "data", tables | _large_tables(study, measures))

    mapped = has_map(study)
    many = len(study.settings) > CHAPTERS
    names = [] if mapped and many else study.settings
    verdicts = tables["claims"].groupby("setting", sort=False)["verdict"].apply(list)
    map_chapter = mapped and {
        "figures": _figures(study, measures, MAP_FIGURES, "map", out),
        "pooled": pooled_fields(study.runs),
    }
    context = {
        "study": study,
        "complete": int(study.runs["complete"].sum()),
        "planned": len(study.runs) + len(sections.absent_runs(study)),
        "headlines": [headline(name, *_rows_of(name, tables)[:3]) for name in names],
        "map_headline": map_headline(study, measures) if mapped else "",
        "answers": answers(measures, tables.get("cures", pd.DataFrame())) if names else [],
        "committed": committed_answers(),
        "overview": _overview(study, measures, out) if names else None,
        "twist": _twist(study, tables, out),
        "map": map_chapter,
        "many_settings": many,
        "matrix": list(verdicts.items()),
        "planned_tests": tables["planned"].to_dict("records") if study.tests else [],
        "has_cures": "cures" in tables,
        "chapters": [_chapter(study.setting(name), tables, out) for name in names],
        "run_notes": sections.run_notes(study),
        "varying": sections.varying_fields(study),
        "config": sections.first_config(study),
        "environment": sections.environment(study),
    }
    index = out / "index.html"
    index.write_text(render(context), encoding="utf-8")
    return index


def _overview(study: StudyRuns, measures: pd.DataFrame, out: Path) -> dict[str, Any]:
    """The first figures of the page; at most `PANELS` settings have room for a panel."""
    some = dataclasses.replace(study, settings=study.settings[:PANELS])
    return _figures(some, measures, STUDY_FIGURES + measure_figures(measures), "all", out)


def _twist(study: StudyRuns, tables: dict[str, pd.DataFrame], out: Path) -> dict[str, Any] | None:
    """What one change of GRPO does, in the setting that shows it best: sentences and a figure."""
    setting = twist_setting(tables["runs"])
    if setting is None:
        return None
    measures, arms, claims, _ = _rows_of(setting, tables)
    figures = _figures(study.setting(setting), measures, [TWIST_FIGURE], "one-change", out)
    return {"words": twist_words(setting, arms, claims), "figures": figures}


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


def _rows_of(setting: str, tables: dict[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """The rows of one setting of the tables runs, arms, claims and paired."""
    some = (tables[name] for name in ("runs", "arms", "claims", "paired"))
    return [table[table["setting"] == setting] for table in some]


def _chapter(study: StudyRuns, tables: dict[str, pd.DataFrame], out: Path) -> dict[str, Any]:
    """One setting: its tables, figures and configuration."""
    setting = study.settings[0]
    measures, *others = _rows_of(setting, tables)
    arms, claims, tests = (table.to_dict("records") for table in others)
    labels, differences = sections.arm_differences(study)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", setting).strip("-").lower() or "setting"
    return {
        "setting": setting,
        "slug": slug,
        "arms": arms,
        "claims": claims,
        "tests": tests,
        "is_one_run": len(study.runs) == 1,
        "figures": _figures(study, measures, SETTING_FIGURES, slug, out),
        "columns": [[name, "", ""] for name in ("field", *labels)],
        "differences": differences,
        "config": sections.first_config(study),
    }


def _figures(
    study: StudyRuns, measures: pd.DataFrame, specs: list[FigureSpec], slug: str, out: Path
) -> dict[str, Any]:
    """Draw every figure the data allows and write its files; those left out are named."""
    drawn, left_out = [], []
    leads = study.with_arms(lead_arms(study.arms))
    shown = measures[measures["arm"].isin(leads.arms)]
    for spec in specs:
        missing = spec.missing(study)
        if missing:
            left_out.append(f"{spec.title} (no {', '.join(missing)})")
            continue
        name = f"{slug}-{spec.key}"
        every = spec.every_arm or leads.arms == study.arms
        figure = spec.draw(study, measures) if every else spec.draw(leads, shown)
        drawing = save_figure(out / "figures", name, spec.title, figure)
        note = "" if every else f"{len(leads.arms)} of {len(study.arms)} arms. "
        drawn.append({"spec": spec, "drawing": drawing, "files": f"figures/{name}", "note": note})
    config = config_line(study)
    if len(study.settings) > CHAPTERS:  # whose names alone would fill a page
        config = config.split(": ", 1)[-1]
    return {"drawn": drawn, "left_out": left_out, "config": config}


def _large_tables(study: StudyRuns, measures: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What the figures of time courses, or of a map, are drawn from."""
    if not has_map(study):
        return {"steps": study.steps, "updates": study.updates}
    # A map's time courses would be hundreds of megabytes, and they are in the run folders anyhow.
    done = measures[measures["complete"]]
    return {"map": map_cells(measures), "frontier": stability_frontier(done)}
