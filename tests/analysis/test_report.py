"""Tests of analysis: the report is whole, self-contained, safe and the same every time."""

import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from subprocess import run

import pandas as pd
import pytest
import synthetic

from moe_rl.analysis import (
    AnalysisError,
    load_study,
    summarize,
    terminal_table,
    write_report,
)
from moe_rl.analysis.data.measures import run_measures
from moe_rl.analysis.report.figures import SETTING_FIGURES, STUDY_FIGURES, has_map
from moe_rl.analysis.report.first_page import answers, twist_setting
from moe_rl.analysis.report.page import bounds
from moe_rl.analysis.report.tables import cures_table, paired_tests
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED


@pytest.fixture
def one_figure(monkeypatch):
    """Reports with a single figure, for tests that are about the words."""
    monkeypatch.setattr("moe_rl.analysis.report.report.SETTING_FIGURES", SETTING_FIGURES[-4:-3])
    monkeypatch.setattr("moe_rl.analysis.report.report.STUDY_FIGURES", [])


class Page(HTMLParser):
    """Every tag, id and reference of a page; an unclosed element is an error."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.references, self.stack = [], [], [], []
        self.feed(html)
        assert not self.stack, f"unclosed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.references.append((tag, value))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    return synthetic.write_study(
        tmp_path_factory.mktemp("whole") / "study",
        arms=["grpo", "gspo", "dense"],
        seeds=2,
        steps=12,
        updates=3,
        mismatch=True,
    )


@pytest.fixture(scope="module")
def index(study_dir):
    return write_report(study_dir)


@pytest.fixture(scope="module")
def html(index):
    return index.read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_no_script(html):
    page = Page(html)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert "@import" not in html and "http://" not in html and "https://" not in html
    for tag, reference in page.references:
        if tag != "a":
            assert reference.startswith(("#", "data:")), (tag, reference)


def test_every_link_of_the_page_leads_somewhere(index, html):
    page = Page(html)
    for tag, reference in page.references:
        if reference.startswith("#"):
            assert reference[1:] in page.ids, reference
        elif tag == "a":
            assert (index.parent / reference).is_file(), reference


def test_ids_are_unique_over_all_inlined_figures(html):
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    clips = re.findall(r"url\(#([^)]+)\)", html)
    assert clips and set(clips) <= set(ids)


def test_every_figure_is_inlined_and_written_as_svg_and_png(index, html):
    figures = [("staleness", spec) for spec in SETTING_FIGURES]
    figures += [("all", spec) for spec in STUDY_FIGURES]
    for place, spec in figures:
        for suffix in ("svg", "png"):
            assert (index.parent / "figures" / f"{place}-{spec.key}.{suffix}").stat().st_size
        assert spec.caption.split(".")[0].replace("'", "&#39;") in html
    assert html.count("<svg") == len(figures)


def test_the_data_are_written_as_csv(index):
    names = {file.name for file in (index.parent / "data").iterdir()}
    tables = {"runs", "arms", "claims", "paired", "steps", "updates"}
    assert names == {f"{name}.csv" for name in tables}


def test_figure_colours_follow_the_theme(html):
    body = html[html.index("<body>") :]
    assert "var(--f-d55e00)" in body and "#d55e00" not in body
    assert "prefers-color-scheme: dark" in html


def test_the_same_files_give_the_same_bytes(study_dir, index, tmp_path):
    copy = tmp_path / "study"
    shutil.copytree(study_dir, copy, ignore=shutil.ignore_patterns("report"))
    other = write_report(copy)
    files = sorted(p.relative_to(index.parent) for p in index.parent.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other.parent) for p in other.parent.rglob("*.*"))
    for name in files:
        assert (index.parent / name).read_bytes() == (other.parent / name).read_bytes(), name


def test_what_files_say_is_escaped(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo"], seeds=1, steps=2, updates=1)
    study = json.loads((root / "study.json").read_text())
    evil = '<script>alert("x")</script>'
    (root / "study.json").write_text(json.dumps(study | {"name": evil, "command": evil}))
    config = root / "runs/staleness/grpo/seed1/config.json"
    config.write_text(config.read_text().replace("running_sum", "</pre><img src=x>"))
    page = Page(write_report(root).read_text())
    assert "script" not in page.tags and "img" not in page.tags


def test_one_seed_of_one_arm_is_enough(tmp_path):
    root = synthetic.write_study(tmp_path / "s", arms=["gspo"], seeds=1, steps=3, updates=2)
    html = write_report(root / "runs/staleness/gspo/seed1").read_text()
    Page(html)
    assert "1 seed an arm" in html


def test_an_interrupted_study_says_what_is_missing(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo", "gspo"], seeds=2, steps=6, updates=1)
    (root / "runs/staleness/grpo/seed1/summary.json").unlink()
    steps = root / "runs/staleness/grpo/seed1/steps.jsonl"
    steps.write_text(steps.read_text()[:-20])
    shutil.rmtree(root / "runs/staleness/gspo/seed2")
    with pytest.warns(UserWarning, match="torn last line"):
        html = write_report(root).read_text()
    assert "Incomplete: staleness / grpo / seed 1, 5 of 6 steps" in html
    assert "Not started: staleness / gspo / 2" in html
    assert "2 of 4 runs complete" in html
    assert "runs/staleness/grpo/seed1/steps.jsonl:6: torn last line skipped" in html
    assert str(tmp_path) not in html


def test_a_study_without_a_complete_run_still_has_a_report(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo"], seeds=1, steps=3, updates=1)
    (root / "runs/staleness/grpo/seed1/summary.json").unlink()
    assert "no run is complete yet" in write_report(root).read_text()


def test_held_out_scores_are_columns_where_a_run_has_them(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo", "gspo"], seeds=1, steps=3, updates=1)
    assert "pass@k" not in write_report(root).read_text()
    file = root / "runs/staleness/gspo/seed1/steps.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"pass_at_1": 0.111, "pass_at_k": 0.222}
    rows[1] |= {"pass_at_1": 0.337, "pass_at_k": 0.554}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(root).read_text()
    Page(html)
    assert all(shown in html for shown in ("pass@1", "pass@k", "33.7%", "55.4%"))
    assert "11.1%" not in html


def test_metrics_that_no_run_recorded_are_named_not_drawn(tmp_path):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo"], seeds=1, steps=3, updates=2)
    file = root / "runs/staleness/grpo/seed1/updates.jsonl"
    kept = ("step", "update", "grad_norm")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: row[k] for k in kept}) + "\n" for row in rows))
    html = write_report(root).read_text()
    assert "Churn by layer over time (no routing/churn_per_layer)" in html


NEW = ("branch/", "ratio/survival", "ratio/mean", "rollout_ratio/")


def test_logs_from_before_tails_and_branches_were_measured_are_loaded_and_drawn(tmp_path):
    arms = ["grpo", "grpo+dual-clip"]
    root = synthetic.write_study(tmp_path / "s", arms=arms, seeds=1, steps=4, updates=2)
    for file in root.rglob("updates.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        old = [{k: v for k, v in row.items() if not k.startswith(NEW)} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in old))
    html = write_report(root).read_text()
    assert "Right tail of the token ratio (no ratio/survival_10" in html
    assert "One thing changed (no ratio/survival_10, branch/negative_above)" in html
    assert "At a glance" in html and "unbounded branch carried" not in html


TWIST = ["grpo", "grpo+dual-clip", "grpo+rollout-old", "gspo", "dense", "dense-gspo"]


def _done(tmp_path, **profiles):
    """Measures of five seeds of the arms that answer the three questions."""
    root = synthetic.write_study(
        tmp_path / "s", arms=TWIST, seeds=5, steps=24, updates=2, profiles=profiles
    )
    return run_measures(load_study(root))


def _answers(measures):
    return answers(measures, cures_table(measures))


def _cells(answer):
    """Arm -> verdict and whether it was judged by its gain, of the first setting that is ill."""
    return {
        arm: (cells[0].verdict, cells[0].by_gain)
        for arm, cells in answer.cures.rows
        if cells[0] is not None
    }


def test_the_first_page_answers_by_what_was_measured(tmp_path):
    measures = _done(tmp_path)
    why, cure, watch = _answers(measures)
    (cause,), (fate,) = why.words, cure.words
    assert cause.startswith(
        "Yes in staleness, no noise, 2 updates a rollout: GRPO on the MoE ended"
    )
    assert "unstable in 5 of 5" in cause and "in 0 of 5" in cause
    assert cure.cures.settings == ["staleness"] and cure.cures.rows[0][0] == "grpo"
    assert _cells(cure)["gspo"] == (REPRODUCED, True) and "dense" not in _cells(cure)
    assert "(no noise, 2 updates a rollout)" in fate and "dense" not in fate
    assert watch.words[0].startswith(
        "Before their collapse the 5 runs that collapsed differ from the 25"
    )
    # Runs that keep to their peak may yet end below others.
    low = measures["arm"] == "grpo"
    below = measures.assign(final=measures["final"].mask(low, 0.5), unstable=False)
    _, cure, _ = _answers(below)
    assert "near its peak in 5 of 5 seeds; above it on the same seeds: " in cure.words[0]
    assert "GSPO by 0.4" in cure.words[0] and "nothing to cure" not in cure.words[0]
    assert cure.cures is None
    # A dense control that falls as well, and GSPO on it that does not.
    ill = measures["arm"] == "dense"
    fallen = measures.assign(
        unstable=measures["unstable"] | ill, final=measures["final"].mask(ill, 0)
    )
    assert "that GSPO restores a dense model too is reproduced" in _answers(fallen)[1].words[0]
    # The same question with the reward of GRPO and of the dense control exchanged.
    names = {"grpo": "dense", "dense": "grpo"}
    swapped = measures.assign(arm=measures["arm"].replace(names))
    why, cure, _ = _answers(swapped)
    assert why.words[0].startswith("No in staleness") and "nothing to cure" in cure.words[0]


def test_a_cure_is_enough_by_what_it_loses_to_a_mild_setting_where_there_is_one(tmp_path):
    hard = _done(tmp_path)
    mild = hard.assign(setting="mild-stale", final=hard["final"].where(hard["arm"] != "gspo", 1.2))
    mild.loc[mild["arm"] == "grpo", ["final", "unstable", "collapsed"]] = [0.9, False, False]
    _, cure, _ = _answers(pd.concat([hard, mild]))
    at_mild = cure.words[1]
    assert cure.cures.mild and cure.cures.settings == ["staleness"]
    assert _cells(cure)["grpo+dual-clip"] == (REPRODUCED, False)
    assert _cells(cure)["gspo"] == (NOT_REPRODUCED, False)
    rows = cures_table(pd.concat([hard, mild])).set_index("arm")
    assert set(rows["mild"]) == {"mild-stale"} and "mild-stale" not in set(rows["setting"])
    assert rows.loc["grpo+dual-clip", "verdict"] == REPRODUCED
    assert rows.loc["gspo", "verdict"] == rows.loc["grpo", "verdict"] == NOT_REPRODUCED
    lost = hard.loc[hard["arm"] == "gspo", "final"].mean() - 1.2
    assert rows.loc["gspo", "value"] == pytest.approx(lost)
    assert cures_table(hard).empty
    without = mild[mild["arm"] != "gspo"]
    _, cure, _ = _answers(pd.concat([hard, without]))
    assert _cells(cure)["gspo"] == (REPRODUCED, True)
    assert _cells(cure)["grpo+dual-clip"] == (REPRODUCED, False)
    assert at_mild.startswith("In mild-stale (") and "peak in 5 of 5 seeds; above it" in at_mild


def test_cures_stand_in_one_table_those_that_are_enough_most_often_first(tmp_path):
    """An arm that a setting lacks leaves its cell empty; GRPO, which is to be cured, heads them."""
    first = _done(tmp_path)
    second = first[first["arm"] != "gspo"].assign(setting="again")
    _, cure, _ = _answers(pd.concat([first, second]))
    arms = [arm for arm, _ in cure.cures.rows]
    assert cure.cures.settings == ["staleness", "again"] and arms[0] == "grpo"
    assert arms[-1] == "gspo" and cure.cures.rows[-1][1][1] is None  # enough in one, not run in two


def test_the_first_page_settles_nothing_on_few_seeds(tmp_path):
    measures = _done(tmp_path)
    why, cure, watch = _answers(measures[measures["seed"] < 3])
    assert why.words[0].startswith("Open in staleness, ")
    assert "a share of seeds needs 5" in why.words[0]
    assert _cells(cure)["gspo"][0] == INCONCLUSIVE
    assert watch.words[0].startswith("Not settled: 2 of 12 runs collapsed")


def test_the_twist_is_told_where_its_arms_were_run(tmp_path, one_figure, html):
    assert "The twist" not in html
    root = synthetic.write_study(tmp_path / "s", arms=TWIST[:3], seeds=5, steps=12, updates=2)
    page = write_report(root).read_text()
    assert page.index("The twist") < page.index("Three questions") < page.index('id="staleness"')
    assert "GRPO + dual clip ended at 0.8" in page and "One thing changed." in page
    assert "GRPO does not collapse: reproduced." in page


def test_the_twist_is_told_of_the_first_setting_in_which_grpo_fails(tmp_path):
    fails = _done(tmp_path)
    stable = fails.assign(setting="calm", unstable=False)
    assert twist_setting(pd.concat([stable, fails])) == "staleness"
    assert twist_setting(stable) == "calm"
    assert twist_setting(fails[fails["arm"] == "grpo"]) is None


def test_the_arms_against_grpo_are_one_family_of_tests(tmp_path):
    tests = paired_tests(_done(tmp_path)).set_index("b")
    family = tests[tests["a"] == "grpo"]
    assert len(family) >= 4 and (family["p_value"] == 2 / 2**5).all()
    assert (family["p_holm"] == len(family) * 2 / 2**5).all()
    assert tests.loc[tests["a"] != "grpo", "p_holm"].isna().all()
    assert (family["wins"] == 5).all() and (family["reading"] == "above").all()


def test_arms_on_fewer_seeds_are_a_family_of_their_own_and_a_wide_interval_is_open(tmp_path):
    measures = _done(tmp_path)
    own = measures["arm"] == "gspo"
    fewer = measures[~(own & (measures["seed"] == 5))]
    tests = paired_tests(fewer).set_index(["a", "b"])
    assert tests.loc[("grpo", "gspo"), "p_holm"] == 2 / 2**4
    assert tests.loc[("grpo", "dense"), "p_holm"] == (len(TWIST) - 3) * 2 / 2**5
    wide = measures["final"].mask(own, measures["seed"].map(lambda seed: 0.3 * (seed % 2)))
    found = paired_tests(measures.assign(final=wide)).set_index(["a", "b"])
    assert found.loc[("grpo", "gspo"), "reading"] == "open"


def test_the_tests_of_a_plan_are_made_where_their_runs_are(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=TWIST, seeds=5, steps=12, updates=2)
    plan = json.loads((root / "study.json").read_text())
    (setting,) = plan["settings"]
    grpo, gspo, dense = ([setting, arm] for arm in ("grpo", "gspo", "dense"))
    absent = ["elsewhere", "gspo"]
    plan["tests"] = [
        ["one", grpo, gspo, "final"],
        ["one", grpo, dense, "final"],
        ["two", gspo, grpo, "peak"],
        ["two", grpo, absent, "final"],
    ]
    (root / "study.json").write_text(json.dumps(plan))
    page = write_report(root).read_text()
    found = pd.read_csv(root / "report" / "data" / "planned.csv")
    measures = run_measures(load_study(root)).set_index(["arm", "seed"])
    assert found["family"].tolist() == ["one", "one", "two"] and "Tests of the plan" in page
    for row in found.to_dict("records"):
        expected = measures.loc[row["b_arm"], row["outcome"]].mean()
        expected -= measures.loc[row["a_arm"], row["outcome"]].mean()
        assert row["difference"] == pytest.approx(expected)
    assert (found["p_value"][:2] == 2 / 2**5).all() and (found["p_holm"][:2] == 4 / 2**5).all()
    assert found["p_holm"][2] == found["p_value"][2]


def test_a_null_and_a_reversal_are_results(tmp_path):
    same, worse = synthetic.Profile(plateau=0.9), synthetic.Profile(plateau=0.4)
    profiles = {"grpo": same, "gspo": worse, "grpo+dual-clip": same}
    tests = paired_tests(_done(tmp_path, **profiles)).set_index(["a", "b"])["reading"]
    assert tests[("grpo", "gspo")] == "below"
    assert tests[("grpo", "grpo+dual-clip")] == "equal within 0.05"


def test_a_study_of_many_arms_keeps_its_lines_to_the_main_ones(tmp_path, monkeypatch):
    kept = [spec for spec in SETTING_FIGURES if spec.key in ("gradient-norm", "reward")]
    monkeypatch.setattr("moe_rl.analysis.report.report.SETTING_FIGURES", kept)
    arms = [*synthetic.PROFILES, "my-own-arm"]
    mine = {"my-own-arm": synthetic.Profile()}
    root = synthetic.write_study(
        tmp_path / "s", arms=arms, seeds=1, steps=4, updates=1, profiles=mine
    )
    figures = root / "report" / "figures"
    html = write_report(root).read_text()
    drawn = {file.stem: file.read_text() for file in figures.glob("*.svg")}
    assert "my-own-arm" not in drawn["staleness-gradient-norm"]
    assert f"6 of {len(arms)} arms." in html
    for every in ("staleness-reward", "all-final-rewards"):
        assert "my-own-arm" in drawn[every]


def test_figures_beside_no_page_of_ours_are_kept(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo"], seeds=1, steps=2, updates=1)
    foreign = root / "report" / "figures" / "thesis.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    write_report(root)
    assert foreign.read_bytes() == b"precious"


def test_old_figures_do_not_outlive_a_redraw(tmp_path, one_figure):
    root = synthetic.write_study(tmp_path / "s", arms=["grpo"], seeds=1, steps=2, updates=1)
    write_report(root)
    stale = root / "report" / "figures" / "gone-reward.svg"
    stale.write_text("old")
    (stale.parent / "notes.txt").write_text("mine")
    write_report(root)
    assert not stale.exists() and (stale.parent / "notes.txt").exists()


def test_a_map_is_drawn_as_map_and_frontier(tmp_path):
    root = synthetic.write_map(tmp_path / "map", seeds=1, noises=(0.0,))
    study = load_study(root)
    assert has_map(study)
    html = write_report(root).read_text()
    Page(html)
    assert "Stability frontier" in html and "Largest stable learning rate at 4 / 8 / 16" in html
    assert (root / "report/data/frontier.csv").is_file()


def test_three_noises_are_a_map_and_two_settings_are_none(tmp_path, one_figure):
    settings = {"quiet": 0.0, "loud": 0.1, "louder": 0.2}
    root = synthetic.write_study(
        tmp_path / "s",
        arms=["grpo", "dense"],
        seeds=2,
        steps=8,
        updates=2,
        settings=tuple(settings),
    )
    for name, noise in settings.items():
        for file in (root / "runs" / name).rglob("config.json"):
            config = json.loads(file.read_text())
            config["config"]["router_noise"] = noise
            file.write_text(json.dumps(config))
    assert "What router noise does" in write_report(root).read_text()
    shutil.rmtree(root / "runs" / "louder")
    assert not has_map(load_study(root))


@pytest.mark.parametrize("field", ["family", "prompts_per_rollout", "num_layers"])
def test_settings_of_several_models_or_rollouts_are_no_map(study_dir, field):
    study = load_study(study_dir)
    copies = [study.runs.assign(router_noise=noise) for noise in (0.0, 0.1, 0.2)]
    runs = pd.concat(copies, ignore_index=True)
    alike, unlike = (runs.assign(**{field: value}) for value in (4, runs["router_noise"]))
    assert has_map(dataclasses.replace(study, runs=alike))
    assert not has_map(dataclasses.replace(study, runs=unlike))


def test_runs_of_a_version_without_noise_on_hidden_states_are_reported(tmp_path):
    root = synthetic.write_study(tmp_path / "s", arms=TWIST, seeds=2, steps=6, updates=2)
    for file in root.rglob("config.json"):
        config = json.loads(file.read_text())
        del config["config"]["hidden_noise"]
        file.write_text(json.dumps(config))
    assert "(no noise, 2 updates a rollout)" in write_report(root).read_text()


def test_two_settings_with_unequal_learning_rates_are_no_map(study_dir):
    assert not has_map(load_study(study_dir))


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AnalysisError):
        write_report(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_the_terminal_table_has_a_row_for_every_arm(study_dir):
    lines = terminal_table(summarize(load_study(study_dir))).splitlines()
    assert [line.split()[1] for line in lines] == ["arm", "grpo", "gspo", "dense"]
    assert max(map(len, lines)) <= 100


def test_analysis_imports_neither_torch_nor_the_trainer():
    code = (
        "import sys, moe_rl.analysis.report; "
        "heavy = ('torch', 'transformers', 'moe_rl.training.trainer', 'matplotlib.pyplot'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bound_near_zero_is_zero_on_the_scale_of_the_other():
    assert bounds(1.8e-3, 0.73) == "[0.00, 0.73]"
    assert bounds(-8.9e-3, 0.28) == "[\u22120.01, 0.28]"
    assert bounds(-1e-4, 0.28) == "[0.00, 0.28]"
    assert bounds(1e-6, 3e-6) == "[1.0e\u22126, 3.0e\u22126]"
    assert bounds(float("nan"), 0.3) == ""
