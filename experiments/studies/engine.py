"""Engine: is what the study finds with our own rollouts so with a real engine's numerics?

Settings: bf16, vLLM on a CPU with weights and arithmetic in bfloat16 under a float32 trainer; 8
updates a rollout, no noise.
Arms: GRPO, GRPO with R3 and GSPO, each with old log-probs that the trainer recomputes and with
vLLM's own.
Seeds: 21 to 23, paired.
Primary outcome: final reward. Three seeds allow no test (the least p of an exact sign-flip test is
0.25): each seed's difference is told, within an arm between the two old log-probs, and between GRPO
and the other two arms. Secondary: KL k3 and router disagreement between vLLM and the trainer, the
part of that KL which R3 removes, the ratio's variance and tail at the first update, where weights
are equal and the two old log-probs alone differ.

It needs the environment of `make vllm`: .venv-vllm/bin/python -m moe_rl study engine
"""

from pathlib import Path

from moe_rl.config import RunConfig
from moe_rl.experiments.study import FIVE_SEEDS, Variants, of_variants
from moe_rl.presets import preset

_OWN: Variants = {
    "grpo": {},
    "grpo+R3": {"routing_replay": "R3"},
    "gspo": {"algorithm": "gspo"},
}
ARMS: Variants = {
    **_OWN,
    **{f"{arm}+rollout-old": {**own, "old_logprobs": "rollout"} for arm, own in _OWN.items()},
}


def runs(root: Path) -> list[RunConfig]:
    """Every arm with both old log-probs."""
    base = preset("mild-stale").replace(setting="bf16", engine="vllm", rollout_precision="bf16")
    return of_variants(base, ARMS, FIVE_SEEDS[:3])
