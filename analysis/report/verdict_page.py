"""Every verdict of the committed studies as one Markdown page, nulls and reversals among them.

python -m moe_rl.analysis.report.verdict_page > docs/verdicts.md
"""

from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.analysis.data.load import read_json
from moe_rl.analysis.report.finals import RESULTS
from moe_rl.analysis.report.page import bounds
from moe_rl.analysis.verdicts.claims import CLAIMS
from moe_rl.analysis.verdicts.verdicts import (
    INCONCLUSIVE,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    STABLE,
)

# Claim -> the arm whose test against GRPO in `paired.csv` has its p.
PAIRS = {
    "replay_restores": "grpo+replay",
    "bounded_branch_holds": "grpo+dual-clip",
    "sampling_denominator_holds": "grpo+rollout-old",
}
HEAD = """# Every verdict

What each claim came to in each setting of each committed study where it was measured, by the rule
above its table (`analysis/verdicts/rules.py`); [results.md](results.md) reads them. Written from
`experiments/results` by `python -m moe_rl.analysis.report.verdict_page`.

Studies share trainings, so that rows are not independent, and verdicts are not corrected for their
number. Where a claim is a test of an arm against GRPO, p is the exact sign-flip test's after Holm's
correction over the arms of that setting on equally many seeds; a claim that its interval reproduces
while p is above 0.05 is "reproduced before correction". (Five seeds have no p below 0.0625.) A
claim that compares settings has one row for all that it compares. Left out are settings where noise
or the model decides the answer beforehand ("not judged"), and, but for their names, those in which
the arm that was to be cured is stable.
"""
SIGNIFICANT = 0.05
UNCORRECTED = "reproduced before correction"


def page(results: Path = RESULTS) -> str:
    """The text of docs/verdicts.md."""
    rows = pd.concat([_study(folder) for folder in sorted(results.iterdir())], ignore_index=True)
    rows = rows[(rows["n"] > 0) & ~rows["reason"].str.startswith(NOT_JUDGED)]
    weak = (rows["verdict"] == REPRODUCED) & (rows["p_holm"] > SIGNIFICANT)
    rows = _once_for_all_settings(rows.assign(verdict=rows["verdict"].mask(weak, UNCORRECTED)))
    parts = [HEAD, *(_claim(rows[rows["key"] == c.key], c.text, c.rule) for c in CLAIMS)]
    return "\n".join(parts).replace("\u2212", "-")  # minus signs: text files here are ASCII


def _study(folder: Path) -> pd.DataFrame:
    """The claims of one study, with its name and, where there is one, a corrected p."""
    if not (folder / "claims.csv").is_file():
        return pd.DataFrame()
    if read_json(folder / "study.json")["mode"] == "map":
        return pd.DataFrame()  # three seeds a cell settle nothing
    claims = pd.read_csv(folder / "claims.csv")
    paired = pd.read_csv(folder / "paired.csv")
    against_grpo = paired[paired["a"] == "grpo"].set_index(["setting", "b"])["p_holm"].to_dict()
    keys = zip(claims["setting"], claims["key"].map(PAIRS), strict=True)
    return claims.assign(study=folder.name, p_holm=[against_grpo.get(key) for key in keys])


def _once_for_all_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for the settings of a study that a claim compares with each other."""
    over_settings = rows["key"].isin([claim.key for claim in CLAIMS if claim.alike])
    shared = rows[over_settings].groupby(["study", "key", "ours"], sort=False)["setting"]
    names = shared.transform(", ".join).reindex(rows.index).fillna(rows["setting"])
    return rows.assign(setting=names).drop_duplicates(["study", "key", "setting"])


def _claim(rows: pd.DataFrame, text: str, rule: str) -> str:
    stable = rows["reason"].str.contains(STABLE)
    lines = [f"## {text}\n", f"{rule}\n"]
    shown = rows[~stable]
    found = shown["verdict"].value_counts()
    verdicts = (REPRODUCED, UNCORRECTED, NOT_REPRODUCED, INCONCLUSIVE)
    counts = [
        f"{found.get(verdict, 0)} {verdict}"
        for verdict in verdicts
        if verdict in found or verdict != UNCORRECTED
    ]
    lines.append(f"{', '.join(counts)}.\n" if len(shown) else "Not measured where it could be.\n")
    if len(shown):
        lines += ["| study | setting | seeds | measured | interval | p | verdict |"]
        lines += ["|---|---|---|---|---|---|---|", *map(_row, shown.to_dict("records")), ""]
    if stable.any():
        names = ", ".join(f"{r.study}/{r.setting}" for r in rows[stable].itertuples())
        lines.append(f"Nothing to cure: {names}.\n")
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    open_ = row["verdict"] in (INCONCLUSIVE, UNCORRECTED)
    verdict = row["verdict"] if open_ else f"**{row['verdict']}**"
    p_value = f"{row['p_holm']:.2g}" if pd.notna(row["p_holm"]) else ""
    cells = [row["study"], row["setting"], row["n"], row["ours"]]
    cells += [bounds(row["low"], row["high"]), p_value, verdict]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(page(), end="")
