"""The losses of other toolkits, called as they are: verl's (`make peers`) and TRL's.

Sequences without a token are left out here: verl does not count them.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_rl.losses import ALGORITHMS, aggregate, make_inputs
from moe_rl.losses.base import Aggregation

NO_DUAL_CLIP = 1e30
VERL_MEANS = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "fixed_length": "seq-mean-token-sum-norm",
}


class Batch(NamedTuple):
    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor


@pytest.fixture
def batch() -> Batch:
    """float64, ragged, [16, 6], with ratios from 1/10 to 10."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    old = -3 * torch.rand(16, 6, generator=draw, dtype=torch.float64)
    new, rollout = (-(old + 0.8 * normal(16, 6)).abs() for _ in range(2))
    lengths = torch.randint(1, 7, (16, 1), generator=draw)
    return Batch(new.requires_grad_(), old, rollout, normal(16), torch.arange(6) < lengths)


def ours(name: str, batch: Batch, options: dict[str, float], how: Aggregation) -> Tensor:
    inputs = make_inputs(
        batch.logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        rollout_logprobs=batch.rollout,
    )
    return aggregate(ALGORITHMS[name].loss(inputs, **options), inputs, how)


def assert_same_loss_and_gradient(one: Tensor, other: Tensor, batch: Batch) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    ours, theirs = (torch.autograd.grad(loss, batch.logprobs)[0] for loss in (one, other))
    assert ours.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def verl() -> Any:
    """The modules of verl that hold its losses."""
    reason = "verl is not installed; make peers installs it"
    pytest.importorskip("verl", reason=reason, exc_type=ImportError)
    from verl.trainer.ppo import core_algos, rollout_corr_helper
    from verl.workers.config import ActorConfig

    return SimpleNamespace(
        losses=core_algos, correction=rollout_corr_helper, ActorConfig=ActorConfig
    )


def verl_loss(
    verl: Any,
    batch: Batch,
    function: str,
    how: Aggregation,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    **settings: float,
) -> Tensor:
    # With its own count of sequences verl does not count a response that is dropped altogether.
    config = verl.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        global_batch_info={"global_batch_size": len(batch.mask)},
        **settings,
    )
    keep = (batch.mask if mask is None else mask).double()
    advantages = batch.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None] * batch.mask
    loss, _ = verl.losses.get_policy_loss_fn(function)(
        batch.old, batch.logprobs, advantages, keep, VERL_MEANS[how], config, weights
    )
    return loss


def clip(low: float, high: float, bound: float = NO_DUAL_CLIP) -> dict[str, float]:
    return {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": bound}


@pytest.mark.parametrize(
    ("name", "function", "options", "settings"),
    [
        ("grpo", "vanilla", {}, clip(0.2, 0.27)),
        ("dual_clip", "vanilla", {}, clip(0.2, 0.27, 3.0)),
        ("dr_grpo", "vanilla", {}, clip(0.2, 0.27)),
        ("dapo", "vanilla", {}, clip(0.2, 0.28)),
        ("cispo", "cispo", {"bound": 2.0}, clip(1.0, 1.0)),
        ("dppo_tv", "dppo_tv", {"bound": 1.5}, clip(0.2, 0.2, 1.5)),
        ("gmpo", "geo_mean", {}, clip(0.4, 0.4)),
        ("sapo", "sapo", {}, {}),
        ("gspo", "gspo", {"clip_low": 0.05, "clip_high": 0.08}, clip(0.05, 0.08)),
        ("gspo_token", "gspo", {"clip_low": 0.05, "clip_high": 0.08}, clip(0.05, 0.08)),
        ("policy_gradient", "gpg", {}, {}),
    ],
)
def test_losses_are_those_of_verl(
    verl: Any,
    batch: Batch,
    name: str,
    function: str,
    options: dict[str, float],
    settings: dict[str, float],
) -> None:
    how = ALGORITHMS[name].aggregation
    theirs = verl_loss(verl, batch, function, how, **settings)
    assert_same_loss_and_gradient(ours(name, batch, options, how), theirs, batch)


def test_gspo_token_with_token_advantages_is_that_of_verl(verl: Any, batch: Batch) -> None:
    draw = torch.Generator().manual_seed(1)
    batch = batch._replace(advantages=torch.randn(16, 6, generator=draw, dtype=torch.float64))
    options = {"clip_low": 0.05, "clip_high": 0.08}
    theirs = verl_loss(verl, batch, "gspo", "sequence_mean", **clip(0.05, 0.08))
    assert_same_loss_and_gradient(
        ours("gspo_token", batch, options, "sequence_mean"), theirs, batch
    )


@pytest.mark.parametrize(
    ("name", "level", "threshold"),
    [
        ("tis", "token", 2.0),
        ("icepop", "token", "0.5_5.0"),
        # verl masks from above only as a range; its sequence ratio is never below e^-20.
        ("mis", "sequence", "1e-30_2.0"),
    ],
)
def test_corrections_of_the_engine_are_those_of_verl(
    verl: Any, batch: Batch, name: str, level: str, threshold: Any
) -> None:
    weights, _ = verl.correction.compute_rollout_correction_weights(
        batch.old - batch.rollout, batch.mask.double(), level, threshold
    )
    kept = weights[batch.mask]
    assert kept.max() <= 5 and (kept.unique().numel() > 3)
    theirs = verl_loss(verl, batch, "vanilla", "sequence_mean", weights=weights, **clip(0.2, 0.27))
    assert_same_loss_and_gradient(ours(name, batch, {}, "sequence_mean"), theirs, batch)


def test_geo_rs_is_that_of_verl_with_the_reciprocal_range(verl: Any, batch: Batch) -> None:
    """verl's `seq_mean_k1` bounds engine over trainer."""
    mask, _ = verl.correction.compute_rollout_rejection_mask(
        batch.old - batch.rollout, batch.mask.double(), "seq_mean_k1", f"{1 / 1.3}_{1 / 0.8}"
    )
    dropped = mask.sum(1) == 0
    assert dropped.any() and not dropped.all()
    theirs = verl_loss(verl, batch, "vanilla", "sequence_mean", mask=mask, **clip(0.2, 0.27))
    options = {"lowest": 0.8, "highest": 1.3}
    assert_same_loss_and_gradient(ours("geo_rs", batch, options, "sequence_mean"), theirs, batch)


def trl_loss(trainer: Any, batch: Batch, **changes: Any) -> Tensor:
    """TRL's `_compute_loss`, which holds its losses, of a trainer that has only what it reads."""
    prompts = torch.zeros(len(batch.mask), 1, dtype=torch.long)
    arguments = {"delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    arguments |= {key: changes.pop(key) for key in list(changes) if key in arguments}
    arguments |= {"use_bias_correction_kl": False, "steps_per_generation": 1}
    whole = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    stand_in: dict[str, Any] = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (
            batch.logprobs,
            torch.zeros_like(batch.old),
            None,
        ),
        "_metrics": {"train": defaultdict(list)},
        "_entropy_bonus_enabled": False,
        "accelerator": whole,
        "args": SimpleNamespace(**arguments),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "max_completion_length": batch.mask.shape[1],
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
    }
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.long),
        "completion_mask": batch.mask.double(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = trainer._compute_loss(SimpleNamespace(**(stand_in | changes)), None, inputs)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("grpo", {}, {"epsilon_low": 0.2, "epsilon_high": 0.27}),
        # Its two-sided clip bounds A > 0 as well, which the upper clip has done already.
        ("dual_clip", {}, {"epsilon_low": 0.2, "epsilon_high": 0.27, "delta": 3.0}),
        ("dr_grpo", {}, {"epsilon_low": 0.2, "epsilon_high": 0.27, "loss_type": "dr_grpo"}),
        ("dapo", {}, {"epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"}),
        ("cispo", {"bound": 2.0}, {"epsilon_high": 2.0, "loss_type": "cispo"}),
        ("sapo", {}, {"loss_type": "sapo"}),
        (
            "gspo",
            {"clip_low": 0.05, "clip_high": 0.08},
            {"epsilon_low": 0.05, "epsilon_high": 0.08, "importance_sampling_level": "sequence"},
        ),
    ],
)
def test_losses_are_those_of_trl(
    batch: Batch, name: str, options: dict[str, float], settings: dict[str, Any]
) -> None:
    pytest.importorskip("trl", reason="trl is not installed; pip install 'moe-rl[trl]'")
    from trl import GRPOTrainer

    theirs = trl_loss(GRPOTrainer, batch, **settings)
    assert_same_loss_and_gradient(
        ours(name, batch, options, ALGORITHMS[name].aggregation), theirs, batch
    )


def test_gmpo_is_that_of_trl(batch: Batch) -> None:
    pytest.importorskip("trl", reason="trl is not installed; pip install 'moe-rl[trl]'")
    from trl.experimental.gmpo import GMPOTrainer

    theirs = trl_loss(GMPOTrainer, batch, epsilon_low=0.4, epsilon_high=0.4)
    assert_same_loss_and_gradient(ours("gmpo", batch, {}, "sequence_mean"), theirs, batch)
