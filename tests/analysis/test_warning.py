"""Early warning: signals with a known worth get it, and only what predicts warns."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import PROFILES, write_run, write_study

from moe_rl.analysis.data.load import AnalysisError, load_study
from moe_rl.analysis.warning.evaluate import (
    FEWEST_SETTINGS,
    HORIZONS,
    Auc,
    WatchedRun,
    auc_table,
    choose_threshold,
    leave_one_out,
    mean_auc,
    stated_table,
    tried_table,
    watched_runs,
)
from moe_rl.analysis.warning.judge import judge
from moe_rl.analysis.warning.signals import SIGNALS, signal_table
from moe_rl.analysis.warning.thresholds import Thresholds, make_thresholds, read_thresholds
from moe_rl.commands.cli import main

STEPS = 12
PREDICTS, ARM, NOISE = "churn", "clip_share", "kl_k3"


def run_with(setting: str, arm: str, seed: int, collapse_step: float, **values: Any) -> WatchedRun:
    """A run whose signals are the given numbers, or lists of them by step."""
    index = pd.Index(range(STEPS), name="step")
    columns = {name: values.get(name, math.nan) for name in SIGNALS}
    signals = pd.DataFrame(columns, index=index, dtype=float)
    return WatchedRun(
        setting=setting, arm=arm, seed=seed, collapse_step=collapse_step, signals=signals
    )


def three_signals(seeds: int = 6) -> list[WatchedRun]:
    """In each setting arm x collapses in all seeds but one, arm y in one.

    One signal knows the runs, one the arm alone, one nothing.
    """
    draw = np.random.default_rng(3)
    runs = []
    for setting in "abcdef":
        for arm in "xy":
            for seed in range(seeds):
                falls = (seed == 0) != (arm == "x")
                signals = {
                    PREDICTS: draw.random() + falls,
                    ARM: float(arm == "x"),
                    NOISE: draw.random(),
                }
                step = float(11 if falls else math.nan)
                runs.append(run_with(setting, arm, seed, step, **signals))
    return runs


def test_a_signal_is_worth_what_it_knows() -> None:
    table = auc_table(three_signals()).set_index(["horizon", "signal"])
    for horizon in HORIZONS:
        predicts, arm, noise = (table.loc[horizon, name] for name in (PREDICTS, ARM, NOISE))
        assert (predicts.auc, predicts.within_arm, predicts.evidence) == (1, 1, "run")
        # Of 36 pairs in a setting 25 are of the two arms in their order, 10 tied, 1 reversed.
        assert (arm.auc, arm.within_arm, arm.evidence) == (30 / 36, 0.5, "arm")
        assert noise.auc_low < 0.5 < noise.auc_high and noise.evidence == "nothing"
        assert table.loc[horizon, "entropy_low"].evidence == "too few"


def auc_of(cases: list[tuple[str, str, float, bool]]) -> Auc:
    """The AUC of runs, each a setting, a stratum, a score and whether it collapses."""
    runs = [run_with(s, "x", 0, 11.0 if falls else math.nan) for s, _, _, falls in cases]
    return mean_auc(runs, [case[2] for case in cases], [case[1] for case in cases])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=25))
def test_the_auc_of_one_stratum_is_mann_whitneys(cases: list[tuple[int, bool]]) -> None:
    bad = [score for score, collapsed in cases if collapsed]
    good = [score for score, collapsed in cases if not collapsed]
    found = auc_of([("one", "all", float(score), falls) for score, falls in cases])
    if not bad or not good:
        assert math.isnan(found.over_settings.value) and found.collapses == 0
        return
    expected = stats.mannwhitneyu(bad, good).statistic / (len(bad) * len(good))
    assert found.over_settings.value == pytest.approx(expected)
    assert (found.collapses, found.survivors) == (len(bad), len(good))


def test_pairs_are_formed_within_a_stratum_alone() -> None:
    """Each stratum is perfect; pooled without strata the scores would be wrong half the time."""
    cases = [(1.0, False), (2.0, True), (101.0, False), (102.0, True)]
    apart = auc_of([("s", stratum, *case) for stratum, case in zip("aabb", cases, strict=True)])
    assert apart.over_settings.value == 1
    assert auc_of([("s", "a", *case) for case in cases]).over_settings.value == 0.75


def test_a_setting_counts_once_however_many_runs_it_has() -> None:
    """A large setting in which the signal is perfect, four small ones in which it is reversed."""
    cases = [("large", "a", float(bad), bad) for bad in (True, False) for _ in range(50)]
    cases += [(s, "a", float(not bad), bad) for s in "bcde" for bad in (True, False)]
    found = auc_of(cases)
    assert found.over_settings.value == pytest.approx(1 / 5) and not found.above_chance
    assert found.over_settings.low < 0 < found.columns("auc")["auc_high"] <= 1


def test_a_perfect_signal_of_few_settings_proves_nothing() -> None:
    perfect = [("a", float(bad), bad) for bad in (True, False) for _ in range(20)]
    few, enough = (
        auc_of([(setting, *case) for setting in settings for case in perfect])
        for settings in ("abcd", "abcde")
    )
    assert FEWEST_SETTINGS == 5 and few.over_settings.value == enough.over_settings.value == 1
    assert not few.above_chance and enough.above_chance


def test_runs_that_have_collapsed_are_no_forecast() -> None:
    """Of 6 collapses of a setting 3 come at step 4: later horizons count the others."""
    runs = [run_with("a", "x", s, 4.0 if s < 3 else 11.0, churn=1.0) for s in range(6)]
    runs += [run_with("a", "y", s, math.nan, churn=0.0) for s in range(6)]
    table = auc_table(runs).set_index(["horizon", "signal"])["collapses"]
    assert [table[horizon, "churn"] for horizon in HORIZONS] == [6, 3, 3, 3]


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40))
def test_a_threshold_is_the_nearest_with_a_tenth_of_false_alarms(scores: list[float]) -> None:
    def alarms(threshold: float) -> int:
        return sum(score > threshold for score in scores)

    threshold = choose_threshold(SIGNALS["churn"], scores)
    assert alarms(threshold) <= len(scores) / 10
    assert alarms(np.nextafter(threshold, -math.inf)) > len(scores) / 10
    assert choose_threshold(SIGNALS["entropy_low"], scores) == -threshold


def test_a_threshold_is_tried_on_the_setting_that_it_was_not_chosen_on() -> None:
    """Setting c lives on another scale: what is calm there alarms by the rule of a and b."""
    runs = []
    for setting, scale in (("a", 1.0), ("b", 1.0), ("c", 100.0)):
        for seed in range(5):
            rising = [0.1 * scale] * 3 + [2.0 * scale] * (STEPS - 3)
            runs.append(run_with(setting, "x", seed, 9.0, churn=rising))
            runs.append(run_with(setting, "y", seed, math.nan, churn=scale))
    table = leave_one_out(runs).set_index(["horizon", "signal", "left_out"])
    a, c, whole = (table.loc[8, "churn", name] for name in ("a", "c", "all"))
    assert (a.hits, a.false_alarms) == (0, 0) and a.threshold == 100
    assert (c.hits, c.false_alarms, c.threshold) == (5, 5, 1.0)
    assert math.isnan(a.median_lead) and c.median_lead == 9
    assert (whole.hits, whole.collapses, whole.false_alarms, whole.survivors) == (5, 15, 5, 15)
    assert "entropy_low" not in table.index.get_level_values("signal")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_lead_is_counted_from_the_first_alarm_to_the_collapse(sign: float) -> None:
    signal = SIGNALS["churn" if sign > 0 else "router_shift"]
    late = {signal.name: [0.0] * 4 + [sign] * 8}
    run = run_with("a", "x", 0, 9.0, **late)
    assert run.lead(signal, 8, sign / 2) == 5
    assert math.isnan(run.lead(signal, 4, sign / 2))  # it rises later
    assert math.isnan(run_with("a", "x", 0, 4.0, **late).lead(signal, 8, sign / 2))  # too late


def test_published_thresholds_are_tried_as_they_are_stated() -> None:
    runs = [run_with("a", "x", s, 9.0, mismatch_kl_k3=0.05, router_shift=0.6) for s in range(3)]
    runs += [
        run_with("a", "y", s, math.nan, mismatch_kl_k3=0.012, router_shift=0.8) for s in range(3)
    ]
    table = stated_table(runs).query("horizon == 5").set_index(["signal", "threshold"])
    rates = table[["hit_rate", "false_alarm_rate"]]
    assert list(rates.loc["mismatch_kl_k3", 0.01]) == [1, 1]
    assert list(rates.loc["mismatch_kl_k3", 0.015]) == [1, 0]
    assert list(rates.loc["mismatch_kl_k3", 0.1]) == [0, 0]
    assert list(rates.loc["router_shift", 0.7]) == [1, 0]


def test_thresholds_of_other_runs_are_tried_in_every_setting() -> None:
    runs = [run_with("a", "x", seed, 9.0, **{PREDICTS: 1.0}) for seed in range(3)]
    runs += [run_with("b", "x", seed, math.nan, **{PREDICTS: float(seed)}) for seed in range(2)]
    table = tried_table(runs, {PREDICTS: 0.5, NOISE: 0.5}, 5).set_index(["signal", "setting"])
    counts = table[["hits", "collapses", "false_alarms", "survivors"]]
    assert list(counts.loc[PREDICTS, "a"]) == [3, 3, 0, 0]
    assert list(counts.loc[PREDICTS, "b"]) == [0, 0, 1, 2]
    assert list(counts.loc[PREDICTS, "all"]) == [3, 3, 1, 2]
    assert list(counts.loc[NOISE, "all"]) == [0, 0, 0, 0]  # not logged


def test_signals_worked_out_by_hand() -> None:
    steps = pd.DataFrame({"step": [0, 1, 2, 3], "reward": [0.1, 0.3, 0.5, 0.7], "entropy": 0.4})
    updates = pd.DataFrame(
        {
            "step": [0, 0, 1, 1, 2, 2, 3, 3],
            "ratio/token_var": [0.0, 0.0, 1.0, 199.0, 1, 1, 1, math.inf],
            "ratio/token_ess": [1, 1, 0.5, 0.25, 1, 1, 1, 1],
            "grad_norm": [1, 1, 2, 2, 3, 3, 8, 8],
        }
    )
    table = signal_table(steps, updates)
    assert list(table["ratio_log_var"]) == [-12, 2, 0, math.inf]
    assert table["lost_sample_size"][1] == 0.625
    assert table["reward_slope"].tolist()[2:] == pytest.approx([0.2, 0.2])
    # Before step 3 the norms are 1, 2, 3: mean 2, deviation 1.
    assert table["grad_norm_jump"][3] == 6 and table["grad_norm_jump"][:3].isna().all()
    assert set(table.columns[table.isna().all()]) == set(SIGNALS) - {
        *("ratio_log_var", "lost_sample_size", "grad_norm", "grad_norm_jump"),
        *("entropy_low", "entropy_high", "reward_slope"),
    }


def test_a_training_that_two_studies_share_counts_once(tmp_path: Path) -> None:
    first = write_study(tmp_path / "a", arms=["grpo", "gspo"], seeds=2, steps=12, updates=1)
    shutil.copytree(first, tmp_path / "b")
    for file in (tmp_path / "b").glob("runs/*/*/*/config.json"):
        whole = json.loads(file.read_text())
        whole["config"] |= {"setting": "other", "arm": f"{whole['config']['arm']}-again"}
        whole["config"]["save_every"] = 4  # which changes no update
        file.write_text(json.dumps(whole))
    write_run(tmp_path / "b", "staleness", "grpo", 9, PROFILES["grpo"], steps=12, updates=1)
    study, again = load_study(tmp_path / "a"), load_study(tmp_path / "b")
    found = [(run.setting, run.arm, run.seed) for run in watched_runs([study, again])]
    ours = [("staleness", arm, seed) for arm in ("grpo", "gspo") for seed in (1, 2)]
    assert sorted(found) == sorted([*ours, ("staleness", "grpo", 9)])


def test_a_setting_is_what_decides_its_runs_whatever_it_is_called(tmp_path: Path) -> None:
    """Hidden noise makes another setting; a default that an older config lacks does not."""
    for seed, (setting, config) in enumerate(
        [("a", {}), ("b", {"hidden_noise": 0.0}), ("c", {"hidden_noise": 1.2})]
    ):
        profile = PROFILES["grpo"]
        write_run(tmp_path, setting, "grpo", seed, profile, steps=12, updates=1, config=config)
    found = {run.seed: run.setting for run in watched_runs([load_study(tmp_path)])}
    assert found == {0: "a", 1: "a", 2: "c"}


def thresholds_for(runs: list[WatchedRun]) -> Thresholds:
    return make_thresholds(runs, ["made up"], 5, auc_table(runs), leave_one_out(runs))


def lines(reward: list[float], churn: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    steps = pd.DataFrame({"step": range(len(reward)), "reward": reward})
    return steps, pd.DataFrame({"step": range(len(churn)), "routing/churn": churn})


@pytest.fixture(scope="module")
def rules() -> Thresholds:
    return thresholds_for(three_signals())


def test_only_a_signal_that_predicts_warns(rules: Thresholds) -> None:
    assert {rule.signal for rule in rules.signals if rule.warns} == {PREDICTS}
    calm = judge(*lines([0.5] * 8, [0.1] * 8), rules)
    assert not calm.warning and calm.words.startswith("calm: routing churn has not")
    told = judge(*lines([0.5] * 8, [0.1] * 4 + [1.9] + [0.1] * 3), rules)
    assert told.warning and told.words.startswith("WARNING: routing churn has")
    beyond = judge(*lines([0.5] * 8, [0.1] * 5 + [1.9] * 3), rules)  # no study has judged it
    assert not beyond.warning
    noisy = lines([0.5] * 8, [math.nan] * 8)
    noisy[1]["kl_k3"] = 1e9
    assert not judge(*noisy, rules).warning
    fallen = judge(*lines([0.5] * 5 + [0.1] * 3, [0.1] * 8), rules)
    assert fallen.warning and "since step 5" in fallen.words and fallen.alarm is None


def test_the_signal_that_tells_best_decides_of_those_that_a_run_logs() -> None:
    """Each is wrong now and then: were any enough, a dozen would make almost every run suspect."""
    committed = read_thresholds()
    best, second = (
        dataclasses.replace(rule, evidence="arm", gain_low=0.5, threshold=0.5, auc=auc)
        for rule, auc in zip(committed.signals[:2], (0.8, 0.7), strict=True)
    )
    both = dataclasses.replace(committed, signals=[second, best])
    assert (best.signal, second.signal) == ("negative_above", "largest_token")

    def warned(**logged: float) -> bool:
        updates = pd.DataFrame({"step": range(3)} | {f"branch/{n}": v for n, v in logged.items()})
        return judge(lines([0.5] * 3, [])[0], updates, both).warning

    assert warned(negative_above=0.9, largest_token=0.1)
    assert not warned(negative_above=0.1, largest_token=0.9)
    assert warned(largest_token=0.9)


def test_a_threshold_that_does_not_carry_over_warns_of_nothing() -> None:
    """The signal orders the runs of every setting, but each setting has its own scale."""
    runs = []
    for place, setting in enumerate("abcdef"):
        for seed in range(5):
            calm = 10.0**place
            runs.append(run_with(setting, "x", seed, 11.0, churn=2 * calm))
            runs.append(run_with(setting, "x", seed + 5, math.nan, churn=calm))
    scaled = thresholds_for(runs)
    rule = next(rule for rule in scaled.signals if rule.signal == "churn")
    assert (rule.evidence, rule.within_arm) == ("run", 1)
    assert not rule.warns
    assert "nothing here predicts" in judge(*lines([0.5], [1e9]), scaled).words


def test_thresholds_are_read_as_they_were_written(rules: Thresholds, tmp_path: Path) -> None:
    rules.write(tmp_path / "t.json")
    assert repr(read_thresholds(tmp_path / "t.json")) == repr(rules)  # NaN is not equal to itself
    assert rules.settings == list("abcdef") and rules.runs == 72


def test_the_committed_thresholds_know_every_signal() -> None:
    rules = read_thresholds()
    assert [rule.signal for rule in rules.signals] == list(SIGNALS)
    assert rules.horizon in HORIZONS and rules.settings
    assert {rule.bad for rule in rules.signals} == {"high", "low"}


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 2, "signals": []}'])
def test_a_file_without_thresholds_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(AnalysisError, match="no thresholds"):
        read_thresholds(tmp_path / "t.json")


def test_from_studies_to_the_verdict_on_a_run(tmp_path: Path, capsys: Any) -> None:
    """In every setting GRPO collapses and GSPO does not: only the arm can be learnt."""
    study = tmp_path / "study"
    for place, setting in enumerate("abcde"):
        rate = {"learning_rate": 1e-4 * (place + 1)}  # or they would be one setting
        for arm in ("grpo", "gspo"):
            for seed in range(5 * place, 5 * place + 5):  # or they would be one training
                profile = PROFILES[arm]
                write_run(study, setting, arm, seed, profile, steps=16, updates=2, config=rate)
    out = tmp_path / "out"
    assert main(["warning", str(study), "--out", str(out)]) == 0
    assert "tells only the arm: " in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        *("auc.csv", "alarms.csv", "stated.csv", "auc.png", "thresholds.json"),
        *("study.json", "runs.csv"),
    }
    again = ["--tried", str(out / "thresholds.json"), "--out", str(tmp_path / "again")]
    assert main(["warning", str(study), *again]) == 0
    tried = pd.read_csv(tmp_path / "again" / "tried.csv").set_index(["signal", "setting"])
    assert tried.loc["ratio_log_var", "all"].hit_rate == 1
    capsys.readouterr()
    auc = pd.read_csv(out / "auc.csv").set_index(["horizon", "signal"])
    assert auc.loc[5, "ratio_log_var"].auc == 1
    assert math.isnan(auc.loc[5, "ratio_log_var"].within_arm)

    def watch(folder: Path, *words: str) -> tuple[int, str, str]:
        code = main(["watch", str(folder), "--thresholds", str(out / "thresholds.json"), *words])
        return code, *capsys.readouterr()

    code, said, _ = watch(study / "runs/a/gspo/seed1", "--follow")
    assert code == 0 and said.splitlines()[-1].startswith("calm: ")
    running = write_run(study, "a", "grpo", 7, PROFILES["grpo"], steps=16, updates=2)
    (running / "summary.json").unlink()
    for name, count in (("steps.jsonl", 6), ("updates.jsonl", 12)):
        kept = (running / name).read_text().splitlines(keepends=True)[:count]
        (running / name).write_text("".join(kept))
    code, said, _ = watch(running, "--follow")  # ends at the warning, not with the run
    assert code == 1 and "it tells arms apart, not runs of one arm" in said.splitlines()[-1]
    code, _, error = watch(study)
    assert code == 2 and "holds 51 runs; give the folder of one" in error
    (running / "steps.jsonl").write_text("")
    code, _, error = watch(running)
    assert code == 2 and "no step has ended yet" in error
    survivors = write_study(tmp_path / "calm", arms=["gspo"], seeds=3, steps=12, updates=1)
    assert main(["warning", str(survivors), "--out", str(out)]) == 2
    assert "no setting of 3 runs has 3 that collapse" in capsys.readouterr().err
