"""Tests of analysis: rows of runs and arms, and the split of the log-ratio variance."""

import json
import math
from statistics import mean, median

import numpy as np
import pandas as pd
import pytest
import synthetic

from moe_rl.analysis.data.load import load_study
from moe_rl.analysis.data.measures import CHAIN, WHOLE, run_measures, summarize
from moe_rl.analysis.verdicts.attribution import COVARIANCE, ROUTING, WEIGHT, shares_by_run
from moe_rl.experiments.arms import arm_key


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return load_study(synthetic.write_study(root, seeds=3, steps=24, updates=4))


def test_the_outcomes_are_those_the_generator_was_told_to_make(study):
    arms = summarize(study).set_index("arm")
    assert arms.loc["grpo", "collapsed"] == 3 and arms.loc["gspo", "collapsed"] == 0
    assert arms.loc["grpo", "final"] == pytest.approx(0.12, abs=0.04)
    assert arms.loc["gspo", "final"] == pytest.approx(0.93, abs=0.05)
    assert 14 <= arms.loc["grpo", "collapse_step"] <= 20  # the fall starts at step 14.4


def test_dense_has_no_churn_and_no_routing_share(study):
    dense = summarize(study).set_index("arm").loc["dense"]
    assert dense["churn_last"] == 0 and dense["routing_share"] == 0


def test_arms_come_in_the_order_of_the_experiment(study):
    assert summarize(study)["arm"].tolist() == sorted(synthetic.PROFILES, key=arm_key)


def test_every_link_of_the_chain_is_the_statistic_of_its_definition(tmp_path):
    """On numbers that all differ: which rows, which column, and a mean, a median or a sum."""
    root = synthetic.write_study(tmp_path, arms=["grpo", "gspo"], seeds=2, steps=40, updates=3)
    study, draw = load_study(root), np.random.default_rng(0)
    skewed = {
        "updates": [
            "routing/churn", "routing/router_disagreement", "routing/token_disagreement",
            "ratio/token_ess", "ratio/token_var", "ratio/sequence_var", "ratio/mean",
            "ratio/survival_10", "rollout_ratio/survival_10", "branch/negative_above",
            "branch/largest_token", "clip_ratio/region", "grad_norm", "skipped", "replay/coverage",
            ROUTING, WEIGHT, COVARIANCE,
        ],
        "steps": ["response_length", "pass_at_1", "pass_at_k", "operations"],
    }  # fmt: skip
    for table, names in skewed.items():
        frame = getattr(study, table)
        for name in names:
            frame[name] = draw.lognormal(size=len(frame))
    study.updates.loc[study.updates.index % 7 == 0, "branch/largest_token"] = 0.0  # no gradient
    measures = run_measures(study).set_index(["arm", "seed"])
    assert measures["collapsed"].tolist() == [True, True, False, False]
    for (arm, seed), found in measures.iterrows():
        updates = _rows(study.updates, arm, seed)
        steps = _rows(study.steps, arm, seed)
        end = measures.loc[("grpo", seed), "collapse_step"]
        before = [row for row in updates if row["step"] < end]
        moved = [row for row in before if row["branch/largest_token"] > 0]
        last = [row for row in before if row["update"] == 2]
        per_rollout = [[r for r in before if r["step"] == step] for step in range(int(end))]
        parts = {name: sum(row[name] for row in before) for name in (ROUTING, WEIGHT, COVARIANCE)}
        want = {
            "churn_one": mean(r["routing/churn"] for r in before if r["update"] == 1),
            "churn_last": mean(r["routing/churn"] for r in last),
            "churn_early": mean(
                r["routing/churn"] for r in updates if r["step"] < 40 // 5 and r["update"] == 2
            ),
            "router_disagreement": mean(r["routing/router_disagreement"] for r in last),
            "token_disagreement": mean(r["routing/token_disagreement"] for r in last),
            "token_var": median(mean(r["ratio/token_var"] for r in rows) for rows in per_rollout),
            "sequence_var": median(
                mean(r["ratio/sequence_var"] for r in rows) for rows in per_rollout
            ),
            "token_ess": mean(r["ratio/token_ess"] for r in before),
            "mean_ratio": mean(r["ratio/mean"] for r in before),
            "survival_10": mean(r["ratio/survival_10"] for r in before),
            "rollout_survival_10": mean(r["rollout_ratio/survival_10"] for r in before),
            "negative_above": median(r["branch/negative_above"] for r in moved),
            "largest_token": median(r["branch/largest_token"] for r in moved),
            "clip_share": mean(r["clip_ratio/region"] for r in before),
            "grad_norm": median(r["grad_norm"] for r in before),
            "routing_share": parts[ROUTING]
            / (parts[ROUTING] + parts[WEIGHT] + 2 * parts[COVARIANCE]),
            "response_length": mean(r["response_length"] for r in steps if r["step"] < end),
            "replay_coverage": mean(r["replay/coverage"] for r in updates),
            "skipped": sum(r["skipped"] for r in updates),
            "pass_at_1": steps[-1]["pass_at_1"],
            "pass_at_k": steps[-1]["pass_at_k"],
            "operations": sum(r["operations"] for r in steps),
        }
        assert set(want) == {*CHAIN, *WHOLE}
        assert found[list(want)].to_dict() == pytest.approx(want), (arm, seed)


def _rows(frame, arm, seed):
    return frame[(frame["arm"] == arm) & (frame["seed"] == seed)].to_dict("records")


def test_the_chain_is_measured_before_the_collapse(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["grpo"], seeds=1, steps=40, updates=2)
    file = root / "runs/staleness/grpo/seed1/updates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    collapse = run_measures(load_study(root))["collapse_step"].iloc[0]
    for row in rows:
        row["clip_ratio/region"] = 0.01 if row["step"] < collapse else 0.99
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_measures(load_study(root))["clip_share"].iloc[0] == pytest.approx(0.01)


def test_tails_are_shares_of_all_tokens_and_branches_those_of_the_usual_update(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["gspo"], seeds=1, steps=3, updates=1)
    file = root / "runs/staleness/gspo/seed1/updates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, value in zip(rows, (0.1, 0.1, 0.7), strict=True):
        row |= {"ratio/mean": value, "ratio/survival_10": value, "branch/negative_above": value}
        row |= {"rollout_ratio/survival_10": value / 2, "branch/largest_token": value / 4}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = run_measures(load_study(root)).iloc[0]
    assert measured["mean_ratio"] == measured["survival_10"] == pytest.approx(0.3)
    assert measured["rollout_survival_10"] == pytest.approx(0.15)
    assert (measured["negative_above"], measured["largest_token"]) == (0.1, 0.025)


def test_updates_without_a_gradient_have_no_branches(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["gspo"], seeds=1, steps=3, updates=1)
    file = root / "runs/staleness/gspo/seed1/updates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, value in zip(rows, (0.0, 0.2, 0.4), strict=True):
        row |= {"branch/negative_above": value, "branch/largest_token": value}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = run_measures(load_study(root)).iloc[0]
    assert measured["negative_above"] == measured["largest_token"] == pytest.approx(0.3)


def test_coverage_is_of_all_updates_and_nan_without_replay(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["gspo", "grpo"], seeds=1, steps=3, updates=1)
    file = root / "runs/staleness/gspo/seed1/updates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, value in zip(rows, (1.0, 0.4, 1.0), strict=True):
        row["replay/coverage"] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = summarize(load_study(root)).set_index("arm")
    assert arms.loc["gspo", "replay_coverage"] == pytest.approx(0.8)
    assert math.isnan(arms.loc["grpo", "replay_coverage"])


def test_a_run_that_collapses_before_the_main_arms_has_a_window_of_its_own(tmp_path):
    early = {"mine": synthetic.Profile(collapse_at=0.2, final=0.0)}
    root = synthetic.write_study(
        tmp_path, arms=["grpo", "mine"], seeds=1, steps=24, updates=1, profiles=early
    )
    measures = run_measures(load_study(root)).set_index("arm")
    own = measures.loc["mine", "collapse_step"]
    assert own < measures.loc["grpo", "collapse_step"] == measures.loc["grpo", "window_end"]
    assert measures.loc["mine", "window_end"] == own


def test_an_incomplete_run_ends_the_window_of_no_other(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["grpo", "gspo"], seeds=1, steps=24, updates=1)
    (root / "runs/staleness/grpo/seed1/summary.json").unlink()
    measures = run_measures(load_study(root)).set_index("arm")
    assert measures.loc["grpo", "collapsed"] and math.isnan(measures.loc["gspo", "window_end"])


def test_arms_are_compared_over_the_steps_before_the_first_collapse_of_the_main_ones(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["grpo", "gspo"], seeds=2, steps=24, updates=1)
    study = load_study(root)
    measures = run_measures(study).set_index(["arm", "seed"])
    for seed in (1, 2):
        end = measures.loc[("grpo", seed), "collapse_step"]
        assert measures.loc[("gspo", seed), "window_end"] == end
        own = study.updates[(study.updates["arm"] == "gspo") & (study.updates["seed"] == seed)]
        expected = own[own["step"] < end]["clip_ratio/region"].mean()
        assert measures.loc[("gspo", seed), "clip_share"] == pytest.approx(expected)


def test_churn_is_taken_one_step_and_all_steps_after_the_old_policy(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["gspo"], seeds=1, steps=3, updates=4)
    study = load_study(root)
    measured = run_measures(study).iloc[0]
    churn = study.updates.groupby("update")["routing/churn"].mean()
    assert measured["churn_one"] == pytest.approx(churn[1])
    assert measured["churn_last"] == pytest.approx(churn[3])


def test_a_run_that_recorded_nothing_has_no_numbers(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["grpo", "gspo"], seeds=1, steps=3, updates=2)
    for name in ("steps.jsonl", "updates.jsonl"):
        (root / "runs/staleness/grpo/seed1" / name).write_text("")
    measures = run_measures(load_study(root)).set_index("arm")
    assert measures.loc["grpo", [*CHAIN, "final"]].isna().all()
    assert measures.loc["gspo", "churn_last"] > 0


def test_an_incomplete_run_is_counted_apart(tmp_path):
    root = synthetic.write_study(tmp_path, arms=["grpo"], seeds=3, steps=12, updates=2)
    (root / "runs/staleness/grpo/seed2/summary.json").unlink()
    row = summarize(load_study(root)).iloc[0]
    assert (row["runs"], row["incomplete"]) == (2, 1)


def _updates(rows, arm="grpo"):
    return pd.DataFrame(
        [
            {
                "setting": "s", "arm": arm, "seed": seed, "step": step,
                ROUTING: routing, WEIGHT: weight, COVARIANCE: covariance,
            }
            for step, (seed, routing, weight, covariance) in enumerate(rows)
        ]
    )  # fmt: skip


def test_shares_add_up_to_one_and_weigh_updates_by_their_variance():
    shares = shares_by_run(_updates([(1, 3.0, 1.0, 0.5), (1, 0.0, 1.0, 0.0)])).iloc[0]
    assert shares["routing_share"] == pytest.approx(3 / 6)
    assert shares["weight_share"] == pytest.approx(2 / 6)
    assert shares["covariance_share"] == pytest.approx(1 / 6)


def test_parts_that_oppose_each_other_give_shares_beyond_one():
    shares = shares_by_run(_updates([(1, 2.0, 1.0, -1.0)])).iloc[0]
    assert shares["routing_share"] == pytest.approx(2.0)
    assert shares["covariance_share"] == pytest.approx(-2.0)


def test_updates_without_a_split_and_on_policy_runs_are_left_out():
    nan = float("nan")
    frame = _updates([(1, nan, nan, nan), (2, 0.0, 0.0, 0.0), (3, 1.0, 1.0, 0.0)])
    assert shares_by_run(frame)["seed"].tolist() == [3]
    assert shares_by_run(frame.drop(columns=[ROUTING])).empty
