"""The documents are true: their samples run; metrics, files and commands they name exist."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_rl.analysis.data.collapse import Outcome, stability_frontier
from moe_rl.analysis.data.measures import CHAIN, WHOLE
from moe_rl.analysis.report.committed import make_answers
from moe_rl.analysis.report.finals import fill
from moe_rl.analysis.report.first_page import QUESTIONS, committed_answers
from moe_rl.analysis.report.tables import paired_tests
from moe_rl.analysis.report.verdict_page import page
from moe_rl.analysis.verdicts.claims import CLAIMS
from moe_rl.commands.cli import main
from moe_rl.presets import preset
from moe_rl.training.run import train

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"]
METRICS, PAPERS = ROOT / "docs" / "metrics.md", ROOT / "docs" / "papers.md"
FILES = ("steps.jsonl", "updates.jsonl", "summary.json")


def section(page: Path, title: str) -> str:
    """The text under a `## ` heading, its sub-headings included."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.M)
    return dict(zip((t.strip("`") for t in parts[1::2]), parts[2::2], strict=True))[title]


def table_names(text: str) -> set[str]:
    """The names in the first cells of all tables; `x` [L] is x and x_per_layer."""
    names = set()
    for cell in re.findall(r"^\| ([^|]+) \|", text, flags=re.M):
        for name, listed in re.findall(r"`([^`]+)`( \[L\])?", cell):
            names |= {name, f"{name}_per_layer"} if listed else {name}
    return names


def code_spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", page.read_text())]


def flat(values: dict[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= flat(value) if isinstance(value, dict) else {name: value}
    return leaves


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The keys that a run with every instrument on writes into each of its files."""
    folder = tmp_path_factory.mktemp("docs")
    # Each has a metric more.
    config = preset("tiny").replace(sft_steps=2, steps=1, algorithm="ppo", routing_replay="TRR")
    config = config.replace(evaluate_every=1, evaluation_prompts=2)
    train(config, folder / "run", cold_start_cache=folder / "cold")
    keys: dict[str, set[str]] = {"summary.json": set(json.loads(read(folder, "summary.json")))}
    for name in ("steps.jsonl", "updates.jsonl"):
        lines = read(folder, name).splitlines()
        keys[name] = {key for line in lines for key in json.loads(line)}
    return keys


def read(folder: Path, name: str) -> str:
    return (folder / "run" / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_every_metric_a_run_writes_is_documented(name: str, written: dict[str, set[str]]) -> None:
    assert not written[name] - table_names(section(METRICS, name))


@pytest.mark.parametrize("name", FILES)
def test_every_documented_metric_is_written(name: str, written: dict[str, set[str]]) -> None:
    assert not table_names(section(METRICS, name)) - written[name]


def test_the_numbers_of_the_report_are_documented() -> None:
    cells = ["arm", "updates_per_rollout", "router_noise", "learning_rate", "seed", "drawdown"]
    frontier = set(stability_frontier(pd.DataFrame(columns=cells)).columns) - set(cells)
    outcome = {field.name for field in dataclasses.fields(Outcome)}
    test = set(paired_tests(pd.DataFrame({"complete": [False], "setting": "a"})).columns)
    test -= {"setting", "a", "b", "n"}
    computed = outcome | {*CHAIN, *WHOLE} - {"skipped"} | frontier | test
    assert table_names(section(METRICS, "The report")) == computed


def test_settings_in_the_docs_are_those_of_the_default_preset() -> None:
    """`field = value` in papers.md, where field is one of the config's."""
    config = flat(preset("mild-stale").to_dict())
    quoted = [span.split(" = ") for span in code_spans(PAPERS) if re.fullmatch(r"\w+ = \S+", span)]
    assert len(quoted) > 20
    for name, value in quoted:
        ours = config[name]
        said = value if isinstance(ours, str) else type(ours)(float(value))
        assert said == ours, f"papers.md says {name} = {value}, the preset has {ours}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_tests_that_docs_name_exist(page: Path) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for span in code_spans(page):
        if re.fullmatch(r"[\w/]+/[\w/]+\.py", span):
            found = any((root / span).is_file() for root in (ROOT, ROOT / "moe_rl"))
            assert found, f"{page.name}: {span}"
        if span.startswith("experiments/results/"):
            assert (ROOT / span).exists(), f"{page.name}: {span}"
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in tests, f"{page.name}: {span}"


def run_samples(
    samples: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    space: dict[str, Any] = {}
    for number, code in enumerate(samples, start=1):
        exec(compile(code, f"sample {number}", "exec"), space)
    return space


# A page's samples run top to bottom in one namespace, as a reader would try them. The block of
# integrations.md trains with TRL: tests/integrations/test_trl_metrics.py runs it.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_samples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    excused = [kind for kind, _ in fences if kind.startswith("python ")]
    assert all(re.match(r"python no-run: \w+", kind) for kind in excused), "say why it cannot run"
    samples = [code for kind, code in fences if kind == "python"]
    if page.name != "integrations.md":
        run_samples(samples, tmp_path, monkeypatch)
    if page == ROOT / "README.md":
        assert re.search(r"[1-9].* of the chosen experts changed", capsys.readouterr().out)


def test_the_commands_of_your_own_loss_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "your_own_loss.md").read_text()
    code, commands = re.findall(r"^```(?:python)?\n(.*?)^```", page, flags=re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss.py").write_text(code)
    train_it, *studies, card = (line.split()[1:] for line in commands.splitlines())
    assert main([*train_it, "--steps", "1", "--sft-steps", "2"]) == 0
    for study, seed in zip(studies, (3, 22), strict=True):
        assert main([*study, "--dry-run"]) == 0
        assert f"symmetric_mask seed {seed}" in capsys.readouterr().out
    assert main(card) == 0
    assert "low 0.5, high 2" in capsys.readouterr().out


def test_the_notebook_runs_and_was_committed_with_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    space = run_samples(["".join(cell["source"]) for cell in code], tmp_path, monkeypatch)
    assert space["churn_by_layer"][8].shape == (4,)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_readme_names_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"moe-rl ([a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    assert main(["--help"]) == 0 and len(named) >= 10
    assert not named - set(re.findall(r"[a-z][a-z-]+", capsys.readouterr().out))


def test_the_tree_of_the_readme_names_folders_and_files_that_exist() -> None:
    folder = ""
    for line in section(ROOT / "README.md", "Where things are").split("```")[1].splitlines()[1:]:
        top = re.match(r"(\w+)/", line)
        folder = top[1] if top else folder
        for name in re.findall(r"(?<![\w/])\w+/(?=\s|,)|\w+\.(?:py|css|md|html\.j2)", line):
            found = [*ROOT.glob(name), *(ROOT / folder).rglob(name.rstrip("/"))]
            assert found, f"{folder}: {name}"


def test_committed_results_were_made_by_the_commands_that_the_docs_give() -> None:
    """`experiments/README.md` has a row a folder of results; its study.json says what made it."""
    results = ROOT / "experiments" / "results"
    rows = re.findall(
        r"^\| `([\w.-]+)` \| `((?:moe-rl|python -m) [^`]+)` \|",
        (results.parent / "README.md").read_text(),
        re.M,
    )
    assert {name for name, _ in rows} == {path.name for path in results.iterdir()}
    for name, command in rows:
        if (results / name).is_file() or command.startswith(("moe-rl warning ", "moe-rl inspect ")):
            continue
        study = json.loads((results / name / "study.json").read_text())
        assert study["command"] == command, name
        runs = pd.read_csv(results / name / "runs.csv")
        made = {(row.setting, row.arm, row.seed) for row in runs.itertuples() if row.complete}
        assert made == {tuple(run) for run in study["runs"]}, f"{name}: runs are missing"


def test_tables_of_finals_are_those_of_the_committed_runs() -> None:
    """`python -m moe_rl.analysis.report.finals docs/results.md` fills them."""
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.count("<!-- finals ") >= 10
    assert fill(page, ROOT / "experiments" / "results") == page


def test_a_report_tells_what_the_committed_studies_answer() -> None:
    """`python -m moe_rl.analysis.report.committed` writes it."""
    told = committed_answers()
    assert list(told.values()) == make_answers(ROOT / "experiments" / "results")
    assert tuple(told) == QUESTIONS and all(answer.words for answer in told.values())


def test_the_page_of_verdicts_is_that_of_the_committed_studies() -> None:
    """`python -m moe_rl.analysis.report.verdict_page > docs/verdicts.md` writes it."""
    text = page(ROOT / "experiments" / "results")
    assert text == (ROOT / "docs" / "verdicts.md").read_text()
    assert all(f"## {claim.text}\n" in text for claim in CLAIMS)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("mild-L2/grpo mild-L2/nobody", "no runs of mild-L2/nobody"),
        ("mild-L2/grpo mild-L2/grpo mild-L2/grpo", "too few cells"),
        ("mild-L2/grpo\nmild-L4/grpo", "a line a row"),
        ("mild-L2/grpo\n", "more comments of finals"),
    ],
)
def test_a_table_of_finals_that_does_not_fit_is_refused(cells: str, said: str) -> None:
    page = f"<!-- finals depth\n{cells}\n-->\n\n| | a | b |\n|---|---|---|\n| x | 1 | 2 |\n"
    with pytest.raises(ValueError, match=said):
        fill(page, ROOT / "experiments" / "results")
