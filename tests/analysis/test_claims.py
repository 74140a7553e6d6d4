"""Tests of analysis: the verdict on every claim, with data on both sides of its rule."""

import pandas as pd
import pytest
import synthetic

from moe_rl.analysis.data.load import load_study
from moe_rl.analysis.verdicts import rules
from moe_rl.analysis.verdicts.claims import CLAIMS, claims_table, open_claims, terminal_verdicts
from moe_rl.analysis.verdicts.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

SEEDS = 5


def _arm(arm, seeds=SEEDS, **values):
    """Rows of `run_measures` for one arm; a list is one value a seed."""
    row = {
        "final": 0.9, "collapsed": False, "unstable": False, "churn_one": 0.05, "churn_last": 0.1,
        "churn_early": 0.1, "routing_share": 0.6, "clip_share": 0.002, "learning_rate": 3e-4,
        "updates_per_rollout": 8, "router_noise": 0.0, "hidden_noise": 0.0, "num_experts": 16,
        "num_layers": 4, "deepest_fall": 0.1, "steps": 40, "collapse_step": 12.0, "token_var": 0.1,
        "sequence_var": 0.01, "response_length": 17.0, "experts_per_token": 2,
        "digits_per_token": None, "rollout_precision": "float32", "pass_at_1": 0.8,
        "operations": 1e15, "peak": 0.95,
    } | values  # fmt: skip
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed}
            | {k: v[seed] if isinstance(v, list) else v for k, v in row.items()}
            for seed in range(seeds)
        ]
    )


def _runs(*arms):
    return pd.concat(arms, ignore_index=True)


FAILS = {"final": 0.2, "collapsed": True, "unstable": True}


@pytest.mark.parametrize(
    ("collapsed", "verdict"),
    [(5, REPRODUCED), (4, INCONCLUSIVE), (1, INCONCLUSIVE), (0, NOT_REPRODUCED)],
)
def test_grpo_collapses_when_most_seeds_do(collapsed, verdict):
    runs = _arm("grpo", collapsed=[seed < collapsed for seed in range(SEEDS)])
    assert rules.grpo_collapses(runs).verdict == verdict


def test_replay_restores_what_grpo_lost():
    runs = _runs(_arm("grpo", **FAILS), _arm("grpo+replay", final=0.9))
    finding = rules.replay_restores(runs)
    assert finding.verdict == REPRODUCED
    assert finding.ours == "GRPO + replay minus GRPO: +0.70"


def test_where_grpo_is_stable_nothing_is_restored_and_nobody_needs_replay():
    arms = [_arm("grpo", final=0.8), *(_arm(a) for a in ("grpo+replay", "gspo", "gspo+replay"))]
    for judge in (rules.replay_restores, rules.gspo_needs_none):
        finding = judge(_runs(*arms))
        assert finding.verdict == INCONCLUSIVE and "GRPO is stable here" in finding.reason
    mixed = [*arms[:2], _arm("gspo", final=[0.9, 0.2, 0.9, 0.2, 0.9])]
    assert "GRPO is stable here" in rules.gspo_needs_none(_runs(*mixed)).reason


@pytest.mark.parametrize(
    "judge", [rules.churn_after_one_update, rules.churn_over_rollout, rules.routing_drives_ratio]
)
def test_what_router_noise_makes_is_not_judged(judge):
    values = {"churn_one": 0.1, "churn_last": 0.1, "routing_share": 0.9}
    assert judge(_arm("grpo", **values)).verdict == REPRODUCED
    noisy = judge(_arm("grpo", router_noise=0.1, **values))
    assert noisy.verdict == INCONCLUSIVE and "not judged" in noisy.reason


RESCUES = [
    ("grpo", "grpo+dual-clip", rules.bounded_branch_holds),
    ("grpo", "grpo+rollout-old", rules.sampling_denominator_holds),
    ("dense", "dense-gspo", rules.gspo_restores_dense),
]


@pytest.mark.parametrize(("baseline", "arm", "judge"), RESCUES)
def test_a_cure_must_restore_and_stay_up_and_have_something_to_restore(baseline, arm, judge):
    assert judge(_runs(_arm(baseline, **FAILS), _arm(arm))).verdict == REPRODUCED
    assert judge(_runs(_arm(baseline, **FAILS), _arm(arm, final=0.24))).verdict == NOT_REPRODUCED
    fallen = _arm(arm, final=0.4, collapsed=True)
    assert judge(_runs(_arm(baseline, **FAILS), fallen)).verdict == NOT_REPRODUCED
    stable = judge(_runs(_arm(baseline), _arm(arm, final=1.0)))
    assert stable.verdict == INCONCLUSIVE and "nothing to restore" in stable.reason
    absent = judge(_arm(baseline, **FAILS))
    assert absent.verdict == INCONCLUSIVE and absent.ours == "not measured"


@pytest.mark.parametrize(
    ("final", "collapsed", "verdict"),
    [
        (0.81, False, REPRODUCED),
        (0.79, False, NOT_REPRODUCED),
        (0.81, [True, False, False, False, False], NOT_REPRODUCED),
        ([0.9, 0.9, 0.9, 0.9, 0.2], False, INCONCLUSIVE),
        ([0.9, 0.9, 0.9, 0.9, 0.2], [False, False, False, False, True], NOT_REPRODUCED),
    ],
)
def test_a_cure_keeps_what_it_reaches_in_the_mild_setting(final, collapsed, verdict):
    hard = _arm("gspo", final=final, collapsed=collapsed)
    assert rules.keeps(hard, _arm("gspo", final=0.9), "gspo").verdict == verdict
    assert rules.keeps(hard, _arm("grpo"), "gspo").verdict == INCONCLUSIVE


@pytest.mark.parametrize("kind", ["router_noise", "hidden_noise"])
def test_a_cure_that_is_not_routing_is_judged_without_noise_alone(kind):
    noise = {kind: 0.1}
    arms = [_arm("dense", **noise, **FAILS), _arm("dense-gspo", **noise)]
    finding = rules.gspo_restores_dense(_runs(*arms))
    assert finding.verdict == INCONCLUSIVE and "not judged" in finding.reason


@pytest.mark.parametrize(("left", "verdict"), [(0.049, REPRODUCED), (0.051, NOT_REPRODUCED)])
def test_replay_removes_the_routing_part_when_less_than_half_the_variance_is_left(left, verdict):
    runs = _runs(_arm("grpo", token_var=0.1), _arm("grpo+replay", token_var=left))
    assert rules.replay_removes_routing(runs).verdict == verdict


@pytest.mark.parametrize(
    ("score", "cost", "verdict"),
    [
        (0.9, 1e15, REPRODUCED),
        (0.7, 1e15, NOT_REPRODUCED),
        (0.9, 1.04e15, REPRODUCED),
        (0.9, 1.06e15, INCONCLUSIVE),
        (0.9, float("nan"), INCONCLUSIVE),
        (float("nan"), 1e15, INCONCLUSIVE),
    ],
)
def test_gspo_converges_faster_when_it_scores_higher_for_no_more_operations(score, cost, verdict):
    runs = _runs(_arm("grpo"), _arm("gspo", pass_at_1=score, operations=cost))
    assert rules.gspo_converges_faster(runs).verdict == verdict


@pytest.mark.parametrize(("power", "verdict"), [(-1.0, REPRODUCED), (0.5, NOT_REPRODUCED)])
def test_the_slope_of_the_sequence_variance_is_that_of_the_power_law(power, verdict):
    lengths = (9.0, 17.0, 33.0)
    arms = [_arm("grpo", response_length=n, sequence_var=3 * n**power) for n in lengths]
    finding = rules.sequence_variance_falls(_runs(*arms))
    assert finding.verdict == verdict and finding.interval.value == pytest.approx(power)
    one_length = rules.sequence_variance_falls(_runs(arms[0], arms[0]))
    assert one_length.verdict == INCONCLUSIVE and one_length.ours == "not measured"
    near = _arm("grpo", response_length=1.4 * 9.0, sequence_var=1e-4)
    assert rules.sequence_variance_falls(_runs(arms[0], near)).interval.n == 0
    enough = _arm("grpo", response_length=1.6 * 9.0, sequence_var=1e-4)
    assert rules.sequence_variance_falls(_runs(arms[0], enough)).interval.n == SEEDS
    for other in ({"num_layers": 8}, {"digits_per_token": 2}):
        longer = _arm("grpo", response_length=33.0, sequence_var=1e-4, **other)
        assert rules.sequence_variance_falls(_runs(arms[0], longer)).interval.n == 0


def test_replay_that_helps_by_less_than_the_margin_restores_nothing():
    runs = _runs(_arm("grpo", **FAILS), _arm("grpo+replay", final=0.24))
    assert rules.replay_restores(runs).verdict == NOT_REPRODUCED


def test_replay_that_helps_but_collapses_restores_nothing():
    runs = _runs(_arm("grpo", **FAILS), _arm("grpo+replay", final=0.4, collapsed=True))
    assert rules.replay_restores(runs).verdict == NOT_REPRODUCED


def test_where_grpo_is_stable_there_is_nothing_to_restore():
    finding = rules.replay_restores(_runs(_arm("grpo"), _arm("grpo+replay")))
    assert finding.verdict == INCONCLUSIVE and "nothing to restore" in finding.reason


def test_seeds_that_disagree_about_replay_are_inconclusive():
    replay = _arm("grpo+replay", final=[0.9, 0.1, 0.9, 0.1, 0.25])
    assert rules.replay_restores(_runs(_arm("grpo", **FAILS), replay)).verdict == INCONCLUSIVE


@pytest.mark.parametrize(("final", "verdict"), [(0.81, REPRODUCED), (0.79, NOT_REPRODUCED)])
def test_gspo_needs_no_replay_when_it_keeps_four_fifths_of_what_replay_gives(final, verdict):
    arms = (_arm("grpo", **FAILS | {"final": 0.0}), _arm("gspo", final=final))
    for replay in ("gspo+replay", "grpo+replay"):
        finding = rules.gspo_needs_none(_runs(*arms, _arm(replay, final=1.0)))
        assert finding.verdict == verdict
        assert finding.ours.startswith(f"gain over GRPO +{final:.2f}, ")


def test_gspo_that_collapses_needs_something():
    runs = _runs(_arm("grpo", **FAILS), _arm("gspo", collapsed=True), _arm("gspo+replay"))
    assert rules.gspo_needs_none(runs).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("churn", "verdict"),
    [(0.051, REPRODUCED), (0.199, REPRODUCED), (0.049, NOT_REPRODUCED), (0.201, NOT_REPRODUCED)],
)
def test_churn_is_about_ten_percent_within_a_factor_of_two(churn, verdict):
    assert rules.churn_after_one_update(_arm("grpo", churn_one=churn)).verdict == verdict
    assert rules.churn_over_rollout(_arm("grpo", churn_last=churn)).verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.51, REPRODUCED), (0.49, NOT_REPRODUCED)])
def test_routing_drives_the_ratio_when_it_is_most_of_the_variance(share, verdict):
    assert rules.routing_drives_ratio(_arm("grpo", routing_share=share)).verdict == verdict


@pytest.mark.parametrize(("clip", "verdict"), [(0.064, REPRODUCED), (0.063, NOT_REPRODUCED)])
def test_gspo_clips_more_by_at_least_a_factor_of_thirty_two(clip, verdict):
    runs = _runs(_arm("gspo", clip_share=clip), _arm("grpo+replay", clip_share=0.002))
    assert rules.gspo_clips_more(runs).verdict == verdict


def test_seeds_that_clip_nothing_have_no_clip_ratio():
    runs = _runs(_arm("gspo", clip_share=0.3), _arm("grpo", clip_share=0.0))
    finding = rules.gspo_clips_more(runs)
    assert finding.verdict == INCONCLUSIVE and finding.ours == "not measured"


CONTROLS = [("dense", rules.dense_is_stable), ("frozen-router", rules.frozen_router_is_stable)]


@pytest.mark.parametrize(("arm", "judge"), CONTROLS)
def test_a_control_holds_only_where_grpo_fails_and_the_control_does_not(arm, judge):
    assert judge(_runs(_arm("grpo", **FAILS), _arm(arm))).verdict == REPRODUCED
    assert judge(_runs(_arm("grpo", **FAILS), _arm(arm, **FAILS))).verdict == NOT_REPRODUCED
    assert judge(_runs(_arm("grpo"), _arm(arm, **FAILS))).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(("arm", "judge"), CONTROLS)
def test_a_control_explains_nothing_where_nothing_fails_or_it_was_not_run(arm, judge):
    stable = judge(_runs(_arm("grpo"), _arm(arm)))
    assert stable.verdict == INCONCLUSIVE and "no failure to explain" in stable.reason
    absent = judge(_arm("grpo", **FAILS))
    assert absent.verdict == INCONCLUSIVE and absent.reason.startswith("not measured")


@pytest.mark.parametrize(("deep", "verdict"), [(0.12, REPRODUCED), (0.08, NOT_REPRODUCED)])
def test_deeper_is_worse_compares_depths_that_are_otherwise_equal(deep, verdict):
    runs = _runs(_arm("grpo"), _arm("grpo", num_layers=12, churn_early=deep))
    assert rules.deeper_is_worse(runs).verdict == verdict


def test_a_depth_that_recorded_no_churn_is_not_compared():
    runs = _runs(_arm("grpo"), _arm("grpo", num_layers=12, churn_early=float("nan")))
    assert "not measured" in rules.deeper_is_worse(runs).reason


def test_depths_with_another_learning_rate_are_not_compared():
    runs = _runs(_arm("grpo"), _arm("grpo", num_layers=12, learning_rate=1e-4))
    assert rules.deeper_is_worse(runs).verdict == INCONCLUSIVE


def test_what_router_noise_makes_or_cannot_reach_is_not_judged():
    noise = {"router_noise": 0.35}
    control = _runs(_arm("grpo", **FAILS, **noise), _arm("dense", **noise))
    finding = rules.dense_is_stable(control)
    assert finding.verdict == INCONCLUSIVE and "cannot reach" in finding.reason
    lengths = [_arm("grpo", response_length=n, sequence_var=1 / n, **noise) for n in (9.0, 33.0)]
    assert rules.sequence_variance_falls(_runs(*lengths)).interval.n == 0
    deep = _arm("grpo", num_layers=12, churn_early=0.5, **noise)
    assert rules.deeper_is_worse(_runs(_arm("grpo", **noise), deep)).verdict == INCONCLUSIVE


def test_noise_that_no_router_sees_reaches_the_dense_control_and_makes_no_churn():
    noise = {"hidden_noise": 1.2}
    runs = _runs(_arm("grpo", routing_share=0.9, **FAILS, **noise), _arm("dense", **noise))
    assert rules.dense_is_stable(runs).verdict == REPRODUCED
    assert rules.churn_after_one_update(runs).verdict == REPRODUCED
    assert rules.routing_drives_ratio(runs).verdict == INCONCLUSIVE  # it makes the other part
    lengths = [_arm("grpo", response_length=n, sequence_var=1 / n, **noise) for n in (9.0, 33.0)]
    assert rules.sequence_variance_falls(_runs(*lengths)).interval.n == 0


def test_a_dense_model_says_nothing_about_a_moe():
    dense = _arm("grpo", **FAILS, num_experts=2)
    for judge in (
        rules.grpo_collapses,
        rules.churn_after_one_update,
        rules.churn_over_rollout,
        rules.routing_drives_ratio,
    ):
        finding = judge(dense)
        assert (
            finding.verdict == INCONCLUSIVE and finding.reason == "not judged: the model is dense"
        )


def test_churn_over_one_update_is_none_and_is_not_judged():
    finding = rules.churn_over_rollout(_arm("grpo", updates_per_rollout=1, churn_last=0.0))
    assert finding.verdict == INCONCLUSIVE and "one update a rollout" in finding.reason


def test_irreversibility_needs_restarted_runs():
    assert rules.collapse_is_irreversible(_arm("grpo", **FAILS)).verdict == INCONCLUSIVE
    fallen = _arm("grpo", **FAILS)
    again = _runs(fallen, _arm("before-half-rate", **FAILS))
    assert rules.collapse_is_irreversible(again).verdict == REPRODUCED
    stable = _runs(fallen, _arm("before-half-rate", steps=35))
    assert rules.collapse_is_irreversible(stable).verdict == NOT_REPRODUCED
    before = _runs(_arm("grpo", **FAILS, collapse_step=3.0), _arm("before-half-rate", steps=35))
    assert "not measured" in rules.collapse_is_irreversible(before).reason, "fallen already"
    both = _runs(again, _arm("before-same"), _arm("after-same", **FAILS))
    assert rules.collapse_is_irreversible(both).verdict == REPRODUCED
    ours = rules.collapse_is_irreversible(both).ours
    assert ours.endswith(f"before-same 0 of {SEEDS}; after-same {SEEDS} of {SEEDS}")


def test_a_restart_is_lost_below_half_of_the_peak_that_grpo_had_reached():
    """A restart that starts low can hardly fall far from a peak of its own."""
    fallen = _arm("grpo", **FAILS, peak=0.8)
    for final, verdict in ((0.39, REPRODUCED), (0.41, NOT_REPRODUCED)):
        again = _arm("before-half-rate", final=final, peak=final, collapsed=False)
        assert rules.collapse_is_irreversible(_runs(fallen, again)).verdict == verdict


def test_restarts_of_runs_that_never_collapsed_say_nothing():
    two = [seed < 2 for seed in range(SEEDS)]
    finding = rules.collapse_is_irreversible(
        _runs(_arm("grpo", collapsed=two), _arm("before-half-rate"))
    )
    assert finding.ours == "0 of 2 below half of the peak" and finding.verdict == INCONCLUSIVE
    none = _runs(_arm("grpo"), _arm("before-half-rate"))
    assert "not measured" in rules.collapse_is_irreversible(none).reason


def test_gspo_tolerates_the_engines_likelihoods_if_it_loses_less_than_the_margin():
    def verdict(final, **where):
        arms = _arm("gspo", final=0.9, **where), _arm("gspo+rollout-old", final=final, **where)
        return rules.tolerates_engine_likelihoods(_runs(*arms)).verdict

    for where in ({"rollout_precision": "int4"}, {"router_noise": 0.35}):
        assert verdict(0.85, **where) == REPRODUCED
        assert verdict(0.6, **where) == NOT_REPRODUCED
        assert verdict([0.9, 0.9, 0.9, 0.9, 0.3], **where) == INCONCLUSIVE
    # Without noise and rounding the two denominators are one.
    assert verdict(0.9) == INCONCLUSIVE
    fallen = _arm("gspo+rollout-old", router_noise=0.35, **FAILS | {"final": 0.85})
    finding = rules.tolerates_engine_likelihoods(_runs(_arm("gspo", router_noise=0.35), fallen))
    assert finding.verdict == NOT_REPRODUCED


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_no_claim_is_settled_by_one_seed_or_by_none(claim):
    arms = [*synthetic.PROFILES, "before-half-rate"]
    assert claim.judge(_runs(*(_arm(arm, seeds=1) for arm in arms))).verdict == INCONCLUSIVE
    assert claim.judge(_arm("grpo").iloc[:0]).verdict == INCONCLUSIVE


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_every_claim_has_its_rule_and_its_source(claim):
    assert claim.rule and "reproduced" in claim.rule
    assert claim.source and claim.paper


def test_the_table_judges_complete_runs_of_each_setting(tmp_path):
    arms = ["grpo", "dense"]
    root = synthetic.write_study(
        tmp_path, arms=arms, seeds=5, steps=24, updates=2, settings=("a", "b")
    )
    for seed in (1, 2, 3):
        (root / f"runs/b/grpo/seed{seed}/summary.json").unlink()
    table = claims_table(load_study(root)).set_index(["setting", "key"])
    assert table.loc[("a", "grpo_collapses"), "verdict"] == REPRODUCED
    assert table.loc[("a", "dense_is_stable"), "verdict"] == REPRODUCED
    assert table.loc[("b", "grpo_collapses"), "verdict"] == INCONCLUSIVE
    assert table.loc[("b", "grpo_collapses"), "n"] == 2
    assert len(table) == 2 * len(CLAIMS)


def test_a_claim_over_settings_pools_those_that_agree_in_all_else(tmp_path):
    root = tmp_path / "s"
    for setting, length in (("short", 8.0), ("long", 32.0)):
        synthetic.write_study(
            root, arms=["grpo"], seeds=5, steps=12, updates=2, settings=(setting,), mode="full"
        )
        for file in (root / "runs" / setting).rglob("steps.jsonl"):
            file.write_text(file.read_text().replace("17.0", str(length)))
    (root / "study.json").unlink()
    table = claims_table(load_study(root)).set_index(["setting", "key"])
    assert table.loc[("short", "sequence_variance_falls"), "n"] == 5


def test_a_study_in_which_nothing_fails_reproduces_no_collapse(tmp_path):
    calm = {"grpo": synthetic.Profile(plateau=0.9)}
    root = synthetic.write_study(
        tmp_path, arms=["grpo"], seeds=5, steps=24, updates=2, profiles=calm
    )
    table = claims_table(load_study(root)).set_index("key")
    assert table.loc["grpo_collapses", "verdict"] == NOT_REPRODUCED


def test_open_are_the_main_claims_that_more_seeds_may_settle():
    row = {"key": "grpo_collapses", "claim": "it falls", "n": 5, "verdict": INCONCLUSIVE}
    row |= {"reason": "4 of 5 seeds"}
    others = [
        {"verdict": REPRODUCED},
        {"n": 3},
        {"key": "dense_is_stable"},
        {"reason": "GRPO is stable here: there is nothing to restore"},
        {"reason": "not judged: the model is dense"},
    ]
    assert open_claims(pd.DataFrame([row, row])) == ["it falls"]
    assert open_claims(pd.DataFrame([row | other for other in others])) == []


def test_the_terminal_says_why_a_verdict_is_inconclusive_and_how_many_seeds_it_needs():
    row = {"setting": "noise", "claim": "GRPO collapses", "n": 5, "ours": "4 of 5 collapsed"}
    reason = "8 seeds at this share would settle it"
    open_one = row | {"verdict": INCONCLUSIVE, "reason": reason}
    settled = row | {"verdict": REPRODUCED, "reason": "interval above 0.5"}
    assert terminal_verdicts(pd.DataFrame([open_one, settled])).splitlines() == [
        f"inconclusive   noise: GRPO collapses (4 of 5 collapsed; {reason})",
        "reproduced     noise: GRPO collapses (4 of 5 collapsed)",
    ]
