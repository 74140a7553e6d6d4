"""Tables of final rewards in a Markdown page, filled from the rows of committed studies.

    python -m moe_rl.analysis.report.finals docs/results.md

Above such a table stands a comment: the study's folder under experiments/results, then a line for
each row of the table, with SETTING/ARM for each of its last cells, and - for an empty one:

    <!-- finals length
    digits-8/grpo digits-16/grpo -
    -->
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
HOLDS = 0.5  # mean final reward above which an arm without a collapse is set in bold
_BLOCK = re.compile(
    r"(?P<head><!-- finals (?P<name>\S+)\n(?P<cells>(?:[^\n]+\n)*?)-->\n\n)"
    r"(?P<table>(?:\|[^\n]*\n)+)"
)


def fill(text: str, results: Path = RESULTS) -> str:
    """The page with the cells of every such table as the complete runs in `results` say.

    Raises:
        ValueError: a comment is not as above or does not fit its table, or names runs that are not
            there.
    """

    def filled(block: re.Match[str]) -> str:
        runs = pd.read_csv(results / block["name"] / "runs.csv")
        runs = runs[runs["complete"]]
        groups = {f"{s}/{a}": own for (s, a), own in runs.groupby(["setting", "arm"])}
        head, rule, *rows = block["table"].splitlines()
        cells = [line.split() for line in block["cells"].splitlines()]
        if len(cells) != len(rows) or len(set(map(len, cells))) != 1:
            raise ValueError(
                f"finals {block['name']}: needs a line a row ({len(rows)}), with as many names each"
            )
        done = [_row(row, names, groups) for row, names in zip(rows, cells, strict=True)]
        return block["head"] + "\n".join([head, rule, *done]) + "\n"

    page, count = _BLOCK.subn(filled, text)
    if count != len(re.findall(r"<!--\s*finals", text, re.I)):
        raise ValueError(
            f"{count} tables are filled, and the page has more comments of finals: one is not "
            "'<!-- finals NAME', lines of names, '-->', an empty line and a table"
        )
    return page


def _row(row: str, names: list[str], groups: Mapping[str, pd.DataFrame]) -> str:
    """A row of a table, `| label | cell |`, with its last cells replaced."""
    labels = row.split("|")[1 : -1 - len(names)]
    missing = [name for name in names if name != "-" and name not in groups]
    if missing or not labels:
        raise ValueError(f"{row}: {'no runs of ' + missing[0] if missing else 'too few cells'}")
    cells = ["" if name == "-" else final_cell(groups[name]) for name in names]
    return "|".join(["", *labels, *(f" {cell} " for cell in cells), ""])


def final_cell(runs: pd.DataFrame) -> str:
    """Mean final reward, its range over seeds, and how many of the seeds collapsed.

    In bold where none did and the mean is `HOLDS` or more.
    """
    final, collapsed = runs["final"], int(runs["collapsed"].sum())
    if final.isna().any() or runs["seed"].duplicated().any():
        first = runs.iloc[0]
        raise ValueError(f"{first.setting}/{first.arm}: a final reward is missing or there twice")
    mean = f"{final.mean():.2f}"
    if not collapsed and final.mean() >= HOLDS:
        mean = f"**{mean}**"
    return f"{mean} ({final.min():.2f} to {final.max():.2f}) {collapsed}/{len(runs)}"


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
