"""Our losses and instruments inside verl: its registry, its loss path, its values."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_rl.losses import ALGORITHMS, make_inputs
from moe_rl.metrics.branches import branch_shares
from moe_rl.metrics.ratios import clip_shares, ratio_statistics

reason = "verl is not installed; make peers installs it"
pytest.importorskip("verl", reason=reason, exc_type=ImportError)

from moe_rl.integrations import verl as plugin  # noqa: E402

B, T = 16, 6
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")


class Batch:
    """float64, ragged, [B, T], with ratios from 1/10 to 10."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.old = -3 * torch.rand(B, T, generator=draw, dtype=torch.float64)
        noise = 0.8 * torch.randn(B, T, generator=draw, dtype=torch.float64)
        self.new = (-(self.old + noise).abs()).requires_grad_()
        self.mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=draw)
        advantages = torch.randn(B, 1, generator=draw, dtype=torch.float64)
        self.advantages = advantages.expand(B, T) * self.mask


def settings(**options: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        global_batch_info={"global_batch_size": B}, **options,
    )  # fmt: skip


def run(mode: str, batch: Batch, how: str, config: Any) -> tuple[Tensor, dict[str, float]]:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    keep = batch.mask.double()
    loss, metrics = get_policy_loss_fn(mode)(
        batch.old, batch.new, batch.advantages, keep, how, config, None
    )
    return loss, metrics


CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.27, "clip_ratio_c": 1e30}


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("grpo", "vanilla", CLIPS),
        ("dual_clip", "vanilla", CLIPS | {"clip_ratio_c": 3.0}),
        ("gspo", "gspo", {"clip_ratio_low": 0.008, "clip_ratio_high": 0.009}),
    ],
)
def test_values_and_gradients_are_verl_s_own(
    ours: str, theirs: str, options: dict[str, float], how: str
) -> None:
    batch, config = Batch(), settings(**options)
    if theirs == "gspo":  # verl's takes the mean over sequences whatever it is told
        how = "seq-mean-token-mean"
    values = [run(mode, batch, how, config)[0] for mode in (f"moe_rl/{ours}", theirs)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(value, batch.new)[0] for value in values]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "sapo", "gpg", "dppo_tv", "cispo", "clip_cov"])
def test_measured_losses_change_nothing_and_measure_what_we_measure(mode: str) -> None:
    batch, config = Batch(), settings(**CLIPS)
    torch.manual_seed(0)  # clip_cov draws
    plain, own = run(mode, batch, "token-mean", config)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    value, metrics = run(f"measured/{mode}", batch, "token-mean", config)
    assert torch.equal(torch.rand(1), drawn), "the trainer's random state has moved"
    assert torch.equal(value, plain)
    theirs = {name: number for name, number in metrics.items() if name in own}
    assert theirs == pytest.approx(own, nan_ok=True)
    gradient = torch.autograd.grad(plain, batch.new)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(value, batch.new)[0])
    new = batch.new.detach()
    expected = {
        **ratio_statistics(new, batch.old, batch.mask),
        **clip_shares(gradient, batch.advantages, batch.mask),
        **branch_shares(
            gradient, new - batch.old, batch.advantages, batch.mask, torch.zeros_like(batch.mask)
        ),
    }
    found = {
        name.removeprefix(plugin.PREFIX): number
        for name, number in metrics.items()
        if name.startswith(plugin.PREFIX)
    }
    assert {n for n in expected if not n.endswith("_flipped")} == set(found)
    if mode != "clip_cov":  # which tokens it drops is drawn anew
        for name, number in found.items():
            assert number == pytest.approx(expected[name], rel=1e-9, nan_ok=True), name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_offered_reads_nothing_that_verl_does_not_hand_over(name: str) -> None:
    """Another engine's log-probs must change the losses that are left out, and no others."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    offered = f"moe_rl/{name}" in POLICY_LOSS_REGISTRY
    assert offered == (name not in plugin.NEEDS_MORE)
    algorithm, batch = ALGORITHMS[name], Batch()
    if algorithm.learns_value or algorithm.reads_routers:
        assert not offered
        return
    losses = [
        algorithm.loss(
            make_inputs(batch.new, batch.old, batch.advantages, batch.mask, rollout_logprobs=engine)
        )
        for engine in (batch.old, batch.old - 1.0)
    ]
    assert torch.equal(*losses) == offered


def test_a_clip_range_of_the_other_kind_of_ratio_is_refused() -> None:
    words = (
        r"clip_low=0\.2: on the scale of token ratios, but gspo .* or set them as .*actor\.clip_"
    )
    with pytest.raises(ValueError, match=words):
        run("moe_rl/gspo", Batch(), "token-mean", settings(**CLIPS))


def test_the_clip_range_is_read_as_verl_s_losses_read_it() -> None:
    batch = Batch()
    config = settings(clip_ratio=0.4, clip_ratio_low=None, clip_ratio_high=None)
    ours, theirs = (run(m, batch, "token-mean", config)[0] for m in ("moe_rl/dual_clip", "vanilla"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_gspo_token_is_verl_s_gspo_with_a_weight_a_token_too() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    batch = Batch()
    config = settings(clip_ratio_low=0.008, clip_ratio_high=0.009)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how, keep = "seq-mean-token-mean", batch.mask.double()
    values = [
        get_policy_loss_fn(mode)(
            batch.old, batch.new, batch.advantages, keep, how, config, weights
        )[0]
        for mode in ("moe_rl/gspo_token", "gspo")
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(value, batch.new)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_the_loss_path_of_verl_s_workers_logs_the_metrics() -> None:
    """`ppo_loss` on a TensorDict of nested tensors, as an engine calls it."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    batch = Batch()
    lengths, prompt = batch.mask.sum(1).tolist(), 3

    def nested(values: Tensor) -> Tensor:
        rows = [row[:length].float() for row, length in zip(values, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    whole = [torch.ones(prompt + length, dtype=torch.int64) for length in lengths]
    # Log-probs of whole sequences: that of a token stands where it is predicted.
    rows = [
        torch.cat([torch.zeros(prompt - 1), row[:length].detach().float(), torch.zeros(1)])
        for row, length in zip(batch.new, lengths, strict=True)
    ]
    data = TensorDict(
        {
            "input_ids": torch.nested.as_nested_tensor(whole, layout=torch.jagged),
            "prompts": torch.nested.as_nested_tensor(
                [torch.ones(prompt, dtype=torch.int64)] * B, layout=torch.jagged
            ),
            "responses": torch.nested.as_nested_tensor(
                [torch.ones(length, dtype=torch.int64) for length in lengths], layout=torch.jagged
            ),
            "response_mask": nested(torch.ones(B, T)),
            "old_log_probs": nested(batch.old),
            "advantages": nested(batch.advantages),
        },
        batch_size=[B],
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": B}.items():
        tensordict_utils.assign_non_tensor(data, **{name: value})
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **CLIPS,
        policy_loss={"loss_mode": "measured/vanilla"},
    )  # fmt: skip
    output = {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
    _, metrics = ppo_loss(config, output, data)
    expected = ratio_statistics(batch.new.detach().float(), batch.old.float(), batch.mask)
    for name, number in expected.items():
        logged = metrics[f"{plugin.PREFIX}{name}"].aggregate()
        assert math.isclose(logged, number, rel_tol=1e-4, abs_tol=1e-6), name


def test_verl_loads_the_plugin_by_itself() -> None:
    code = (
        "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn; "
        "print(get_policy_loss_fn('moe_rl/gspo'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "function measured" in done.stdout, done.stderr[-500:]
