"""Recipe cards of the arms: what each computes, where it is from, and who else computes the same.

    moe-rl arms NAME

Written here is only what the code does not say: which flags of other trainers give the same, read
in the sources of verl 0.9.1, TRL 1.16.0 and slime 624b824, and when an arm that is no loss of its
own is a no-op. Formula and source come from the loss's docstring, defaults from its signature, all
else from the arm's config.
"""

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_rl.config import RunConfig, flat_settings
from moe_rl.experiments.arms import ARMS, Arm, check_arms, find_arm

if TYPE_CHECKING:
    from moe_rl.losses import Algorithm

NONE = "none"
SEQUENCE_MEAN = "actor.loss_agg_mode=seq-mean-token-mean"
# verl's loss always has the dual clip, and cuts ratios at e^20 = 4.9e8.
OPEN = f"actor.clip_ratio_c=1e9 {SEQUENCE_MEAN}"
CORRECTION = "algorithm.rollout_correction"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the code does not say about an arm."""

    verl: str = NONE
    """Options that give the same; `actor.` is actor_rollout_ref.actor."""
    trl: str = NONE
    """Arguments of GRPOConfig that give the same."""
    slime: str = NONE
    """Options that give the same."""
    given: str = ""
    """What its loss's formula is taken with, where the arm is no loss of its own."""
    denominator: str = ""
    """Whose probability it is, where the config does not say."""
    no_op: str = ""
    """Where the arm is as without what it adds; where empty, the loss's docstring says so."""


_GRPO = Recipe(
    verl=f"actor.clip_ratio_low=0.2 actor.clip_ratio_high=0.27 {OPEN}",
    trl='loss_type="grpo", epsilon=0.2, epsilon_high=0.27',
    slime="--eps-clip 0.2 --eps-clip-high 0.27",
)
_GSPO = Recipe(
    verl="actor.policy_loss.loss_mode=gspo actor.clip_ratio_low=3e-4 actor.clip_ratio_high=4e-4 "
    + SEQUENCE_MEAN,
    trl='importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4',
    slime="--advantage-estimator gspo --eps-clip 3e-4 --eps-clip-high 4e-4",
)
_RECORDED = "e_it the recorded experts (R2: of the old pass, R3: of the engine)"
_HEAD = """# Recipe cards

What each arm computes, whose probability stands in the ratio's denominator, and which options of
other trainers give the same. `moe-rl arms` prints the table, `moe-rl arms NAME` one card, and
`moe-rl arms --markdown > docs/recipes.md` writes this page. w is the ratio to the old policy, A the
advantage.

The other trainers are verl 0.9.1, TRL 1.16.0 and THUDM/slime at 624b824, each read in its source;
"none" means that no option gives the same. In verl `actor.` stands for `actor_rollout_ref.actor.`;
its loss always has the dual clip, so that the plain formula needs a bound of 1e9. TRL with vLLM
weights every loss by trainer over engine unless `vllm_importance_sampling_correction=False`.
"""
_DR_GRPO = (
    "actor.loss_agg_mode=seq-mean-token-sum-norm actor.loss_scale_factor=TOKENS "
    "algorithm.norm_adv_by_std_in_grpo=false"
)
_SLIME_MIS = (
    "--use-tis --custom-tis-function-path "
    "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp --custom-config-path FILE"
)

RECIPES: dict[str, Recipe] = {
    "grpo": _GRPO,
    "grpo+dual-clip": Recipe(
        verl=f"actor.clip_ratio_c=3.0 (the default) with clip_ratio_high=0.27 {SEQUENCE_MEAN}",
        trl=f"delta=3.0, {_GRPO.trl}",
        slime=f"--eps-clip-c 3.0 {_GRPO.slime}",
    ),
    "grpo+rollout-old": Recipe(
        verl=f"{CORRECTION}.bypass_mode=true {CORRECTION}.rollout_is=null, and those of grpo",
        slime=f"--use-rollout-logprobs {_GRPO.slime}",
        given="w_it = exp(logprobs_it - rollout_logprobs_it)",
        no_op="where engine and trainer agree",
    ),
    "grpo+mean-old": Recipe(
        given="exp(old_logprobs_it) = 1/8 sum_k pi_k(y_it), the mean over 8 passes k",
        no_op="where all passes of the old policy give the same",
    ),
    "grpo+trr": Recipe(
        given="w_it = pi(y_it | e_it, g_it) / pi_old(y_it | e_it, g_it), e_it the experts and "
        "g_it the gate weights that the engine recorded",
        no_op="where all passes give experts the same weights",
    ),
    "grpo+replay": Recipe(
        verl="actor.router_replay.mode=R2 (or R3), and those of grpo",
        trl='RoutingReplayGRPOTrainer of moe_rl.integrations.trl, routing_replay="R2" (or "R3")',
        slime="--use-routing-replay (R2) or --use-rollout-routing-replay (R3), and those of grpo",
        given=f"w_it = pi(y_it | e_it) / pi_old(y_it | e_it), {_RECORDED}",
        no_op="in a dense model, or where all passes choose the same experts",
    ),
    "dr-grpo": Recipe(
        verl="actor.clip_ratio_low=0.2 actor.clip_ratio_high=0.27 actor.clip_ratio_c=1e9 "
        + _DR_GRPO,
        trl='loss_type="dr_grpo", scale_rewards="none", epsilon=0.2, epsilon_high=0.27',
        slime="--disable-grpo-std-normalization, with a --custom-pg-loss-reducer-function-path of "
        "your own that divides by a constant",
        given="A_i = r_i - mean of the group's r, L = 1/(N T) sum_it l_it, N responses of at "
        "most T tokens",
        no_op="on responses of full length, up to the scale of each group's advantages",
    ),
    "ppo": Recipe(
        verl="none exactly: algorithm.adv_estimator=gae trains a critic model of its own",
        slime="none exactly: --advantage-estimator ppo trains a critic model of its own",
    ),
    "dapo": Recipe(
        verl="actor.clip_ratio_low=0.2 actor.clip_ratio_high=0.28 actor.clip_ratio_c=1e9 "
        "actor.loss_agg_mode=token-mean",
        trl='loss_type="dapo", epsilon=0.2, epsilon_high=0.28',
        slime="--eps-clip 0.2 --eps-clip-high 0.28 --calculate-per-token-loss",
    ),
    "cispo": Recipe(
        verl="actor.policy_loss.loss_mode=cispo actor.clip_ratio_low=1 actor.clip_ratio_high=4 "
        "actor.loss_agg_mode=token-mean",
        trl='loss_type="cispo", epsilon_high=5.0',
        slime="--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 4.0 "
        "--calculate-per-token-loss",
    ),
    "tis": Recipe(
        verl=f"{CORRECTION}.rollout_is=token {CORRECTION}.rollout_is_threshold=2.0, and those of "
        "grpo",
        trl='vllm_importance_sampling_mode="token_truncate", '
        f"vllm_importance_sampling_clip_max=2.0, {_GRPO.trl}",
        slime=f"--use-tis --tis-clip 2.0 {_GRPO.slime}",
    ),
    "mis": Recipe(
        verl=f"{CORRECTION}.rollout_is=sequence "
        f'{CORRECTION}.rollout_is_threshold="1e-9_2.0", and those of grpo',
        trl='vllm_importance_sampling_mode="sequence_mask" (the default), '
        f"vllm_importance_sampling_clip_max=2.0, {_GRPO.trl}",
        slime=f"{_SLIME_MIS}, which has tis_level: sequence, tis_mode: mask, tis_upper_bound: 2.0 "
        "and a tis_lower_bound near 0",
    ),
    "geo-rs": Recipe(
        verl=f"{CORRECTION}.rollout_is=null {CORRECTION}.rollout_rs=seq_mean_k1 "
        f'{CORRECTION}.rollout_rs_threshold="0.99_1.01", and those of grpo',
        slime=f"none exactly: {_SLIME_MIS}, which has use_rs: true, rs_level: geometric, drops the "
        "same responses, and weights the tokens of the others",
    ),
    "icepop": Recipe(
        verl=f'{CORRECTION}.rollout_is=token {CORRECTION}.rollout_is_threshold="0.5_5.0", and '
        "those of grpo",
        trl='vllm_importance_sampling_mode="token_mask", vllm_importance_sampling_clip_min=0.5, '
        f"vllm_importance_sampling_clip_max=5.0, {_GRPO.trl}",
        slime="--use-tis --tis-clip-low 0.5 --tis-clip 5.0 --custom-tis-function-path "
        f"slime.backends.megatron_utils.loss.icepop_function {_GRPO.slime}",
    ),
    "dppo-tv": Recipe(
        verl="none exactly: actor.policy_loss.loss_mode=dppo_tv actor.clip_ratio_low=0.2 "
        f"actor.clip_ratio_high=0.2 actor.clip_ratio_c=5 {_DR_GRPO} has the loss with recomputed "
        "old log-probs; its bypass mode has a loss of its own",
    ),
    "gmpo": Recipe(
        verl="actor.policy_loss.loss_mode=geo_mean actor.clip_ratio_low=0.4 "
        "actor.clip_ratio_high=0.4",
        trl="GMPOTrainer of trl.experimental.gmpo, epsilon=0.4 (its default)",
    ),
    "sapo": Recipe(
        verl="actor.policy_loss.loss_mode=sapo",
        trl='loss_type="sapo"',
    ),
    "rspo": Recipe(),
    "gspo": _GSPO,
    "gspo-token": Recipe(
        verl=_GSPO.verl,
        trl="those of gspo, equal with one advantage per response",
        slime="those of gspo, equal with one advantage per response",
    ),
    "gspo+replay": Recipe(
        verl="actor.router_replay.mode=R2 (or R3), and those of gspo",
        trl='RoutingReplayGRPOTrainer of moe_rl.integrations.trl, routing_replay="R2" (or "R3"), '
        "and those of gspo",
        slime="--use-routing-replay (R2) or --use-rollout-routing-replay (R3), and those of gspo",
        given=f"s_i of w_it = pi(y_it | e_it) / pi_old(y_it | e_it), {_RECORDED}",
        no_op="in a dense model, or where all passes choose the same experts",
    ),
    "policy-gradient": Recipe(
        denominator="none: there is no ratio",
        verl=f"actor.policy_loss.loss_mode=gpg {SEQUENCE_MEAN}",
    ),
    "positive-only": Recipe(),
    "dense": Recipe(
        **dict.fromkeys(("verl", "trl", "slime"), "a dense model, and those of grpo"),
        given="a dense model, which has as many experts as are active",
        no_op="never: it is another model",
    ),
    "dense-gspo": Recipe(
        **dict.fromkeys(("verl", "trl", "slime"), "a dense model, and those of gspo"),
        given="a dense model, which has as many experts as are active",
        no_op="never: it is another model",
    ),
    "frozen-router": Recipe(
        given="routers whose weights have no gradient", no_op="in a dense model"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is said of one arm."""

    arm: Arm
    text: str
    """What its loss's docstring says, formula and source among it."""
    denominator: str
    """Whose probability stands in the ratio's denominator."""
    aggregation: str
    advantages: str
    defaults: str
    no_op: str
    settings: str
    """Options of `moe-rl train` that differ from the defaults."""
    recipe: Recipe

    @property
    def formula(self) -> str:
        """The lines that the docstring sets apart; its first sentence where there are none."""
        lines = [line.strip() for line in self.text.splitlines() if line.startswith("    ")]
        return "\n".join(lines) or self.text.split("\n\n")[0].replace("\n", " ")

    @property
    def rows(self) -> dict[str, str]:
        """Everything but the docstring, by name."""
        given = {"with": self.recipe.given} if self.recipe.given else {}
        return {
            **given,
            "paper": self.arm.paper or "your own",
            "denominator": self.denominator,
            "aggregation": self.aggregation,
            "advantages": self.advantages,
            "defaults": self.defaults,
            "no-op": self.no_op,
            "moe-rl train": self.settings,
            "verl": self.recipe.verl,
            "TRL": self.recipe.trl,
            "slime": self.recipe.slime,
        }

    def as_text(self) -> str:
        """The card as `moe-rl arms NAME` prints it."""
        rows = [f"{name:<13} {value}" for name, value in self.rows.items()]
        text = "\n".join(f"    {line}".rstrip() for line in self.text.splitlines())
        return "\n".join([f"{self.arm.name}: {self.arm.label}", "", text, "", *rows])


def card(name: str) -> Card:
    """The recipe card of an arm of the table, or of a user's own loss FILE.py:FUNCTION.

    Raises:
        ConfigError: there is no such arm.
    """
    from moe_rl.losses.custom import choose_algorithm

    check_arms([name])
    arm, base = find_arm(name), RunConfig()
    config = arm.change(base, "R3")
    algorithm = choose_algorithm(config.algorithm, config.loss)
    text = inspect.getdoc(algorithm.loss) or "The function has no docstring."
    recipe = RECIPES.get(name, Recipe())
    options = [f"{key} {value:g}" for key, value in algorithm.options.items()]
    return Card(
        arm=arm,
        text=text,
        denominator=recipe.denominator or _denominator(config),
        aggregation=config.aggregation or algorithm.aggregation,
        advantages=_advantages(algorithm),
        defaults=", ".join(options) or NONE,
        no_op=recipe.no_op or _no_op(text),
        settings=_settings(config, base),
        recipe=recipe,
    )


def _advantages(algorithm: "Algorithm") -> str:
    if algorithm.learns_value:
        return "of each token, against the value that a head of the policy expects"
    divided = "" if algorithm.scale_advantages else "not "
    return f"of the group, {divided}divided by its standard deviation"


def _denominator(config: RunConfig) -> str:
    if config.old_logprobs == "rollout":
        return "the rollout engine's, of the policy that sampled"
    if config.old_passes > 1:
        return f"the old policy's, mean of {config.old_passes} passes of the trainer"
    return "the old policy's, one pass of the trainer before the updates"


def _no_op(text: str) -> str:
    """The sentence of a docstring that says when the method is a no-op."""
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    sentences = re.split(r"\n\n|(?<=\.)\s+(?=[A-Z])", prose)
    return next((" ".join(s.split()) for s in sentences if "no-op" in s), "not said")


def _settings(config: RunConfig, base: RunConfig) -> str:
    """The options that make `config` from `base`."""
    ours, theirs = flat_settings(config.to_dict()), flat_settings(base.to_dict())
    words = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in ours.items()
        if value != theirs[key]
    ]
    return " ".join(words) or "the defaults"


def all_cards() -> list[Card]:
    """The cards of all arms, in the order of the table."""
    return [card(name) for name in ARMS]


def as_markdown() -> str:
    """All cards as the page docs/recipes.md."""
    parts = [_HEAD]
    for one in all_cards():
        rows = "".join(
            f"| {name} | {value.replace('|', chr(92) + '|')} |\n"
            for name, value in one.rows.items()
        )
        text = f"```\n{one.text}\n```"
        parts.append(f"## {one.arm.name}\n\n{one.arm.label}.\n\n{text}\n\n| | |\n|---|---|\n{rows}")
    return "\n".join(parts)
