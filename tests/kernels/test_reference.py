"""The definition of token log-probabilities against formulas written out in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import logprobs_of

from moe_rl.kernels import token_logprobs


def inputs(
    n: int, hidden_size: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [n, H], weight [V, H], targets [n], bias [V]; the same for the same sizes."""
    draw = torch.Generator().manual_seed(n + 100 * hidden_size + 10_000 * vocab)
    hidden = torch.randn(n, hidden_size, generator=draw, dtype=torch.float64) * scale
    weight = torch.randn(vocab, hidden_size, generator=draw, dtype=torch.float64)
    bias = torch.randn(vocab, generator=draw, dtype=torch.float64)
    targets = torch.randint(vocab, (n,), generator=draw)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, temperature: float
) -> np.ndarray:
    """softmax((h W^T + b) / temperature), one row a token, in NumPy float64."""
    h, w, b = (tensor.detach().double().numpy() for tensor in (hidden, weight, bias))
    exponentials = np.exp((np.einsum("nh,vh->nv", h, w) + b) / temperature)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@given(
    n=st.integers(0, 5),
    hidden_size=st.integers(1, 9),
    vocab=st.integers(1, 17),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_values_equal_the_float64_formula(
    n: int, hidden_size: int, vocab: int, temperature: float
) -> None:
    hidden, weight, targets, bias = inputs(n, hidden_size, vocab)
    p = probabilities(hidden, weight, bias, temperature)
    logprobs, entropy, _ = token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, entropy=True
    )
    np.testing.assert_allclose(logprobs, np.log(p[np.arange(n), targets]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_closed_form() -> None:
    """d logprob / d h = (W[target] - p W) / T; d logprob / d W[v] = (1[v = target] - p_v) h / T."""
    hidden, weight, targets, bias = inputs(6, 5, 11, torch.float64)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in (hidden, weight, bias))
    logprobs_of(hidden, weight, targets, bias=bias, temperature=0.7).sum().backward()
    p = torch.from_numpy(probabilities(hidden, weight, bias, 0.7))
    residual = (torch.nn.functional.one_hot(targets, 11) - p) / 0.7
    torch.testing.assert_close(hidden.grad, residual @ weight)
    torch.testing.assert_close(weight.grad, residual.T @ hidden)
    torch.testing.assert_close(bias.grad, residual.sum(0))


def test_the_gradient_of_the_entropy_passes_a_numerical_check() -> None:
    hidden, weight, targets, bias = inputs(3, 4, 5, torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))

    def entropy(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return token_logprobs(h, w, targets, bias=b, temperature=1.3, entropy=True)[1]

    assert torch.autograd.gradcheck(entropy, leaves)


def test_probabilities_of_all_words_sum_to_one() -> None:
    hidden, weight, _, _ = inputs(4, 8, 9)
    every = [logprobs_of(hidden, weight, torch.full((4,), v)).exp() for v in range(9)]
    torch.testing.assert_close(torch.stack(every).sum(0), torch.ones(4))


def test_asking_for_the_entropy_does_not_change_the_logprobs() -> None:
    hidden, weight, targets, _ = inputs(40, 16, 50)
    alone = logprobs_of(hidden, weight, targets)
    assert torch.equal(alone, token_logprobs(hidden, weight, targets, entropy=True)[0])


def test_equal_logits_give_log_v() -> None:
    logprobs, entropy, _ = token_logprobs(
        torch.zeros(2, 3), torch.randn(7, 3), torch.tensor([0, 6]), entropy=True
    )
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(7)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(7)))


def test_any_leading_shape_is_kept() -> None:
    hidden, weight, targets, _ = inputs(6, 5, 11)
    flat = logprobs_of(hidden, weight, targets)
    for shape in ((2, 3), (1, 3, 2)):
        shaped = token_logprobs(hidden.view(*shape, 5), weight, targets.view(shape), entropy=True)
        assert torch.equal(shaped[0], flat.view(shape)) and shaped[1].shape == shape
    torch.testing.assert_close(logprobs_of(hidden[0], weight, targets[0]), flat[0])


def test_half_precision_inputs_are_computed_in_float32() -> None:
    hidden, weight, targets, bias = inputs(8, 32, 64, torch.bfloat16)
    logprobs = logprobs_of(hidden, weight, targets, bias=bias)
    assert logprobs.dtype == torch.float32
    upcast = logprobs_of(hidden.float(), weight.float(), targets, bias=bias.float())
    assert torch.equal(logprobs, upcast)


def test_autocast_does_not_change_the_result() -> None:
    hidden, weight, targets, _ = inputs(8, 32, 64)
    expected = logprobs_of(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logprobs_of(hidden, weight, targets, backend="reference"), expected)


def test_float64_stays_float64() -> None:
    hidden, weight, targets, _ = inputs(8, 32, 64, torch.float64)
    assert logprobs_of(hidden, weight, targets).dtype == torch.float64
    assert logprobs_of(hidden.float(), weight, targets).dtype == torch.float64


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets, _ = inputs(8, 32, 64, scale=1e4)
    hidden.requires_grad_()
    logprobs, entropy, _ = token_logprobs(hidden, weight, targets, entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.isfinite().all() and entropy.isfinite().all() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("target", [-100, -1, 9])
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_target_outside_the_vocabulary_is_an_error(target: int, backend: str) -> None:
    """The interpreter would read whatever lies before the first word, or behind the last."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where a GPU is, and do not take tensors of the CPU")
    hidden, weight, targets, _ = inputs(4, 8, 9)
    targets[2] = target
    said = rf"targets={target}: must lie in \[0, 9\), or be the ignore_index, which is None"
    with pytest.raises(IndexError, match=said):
        token_logprobs(hidden, weight, targets, ignore_index=None, backend=backend)
    token_logprobs(hidden, weight, targets, ignore_index=target, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, r"hidden=\[4, 7\], weight=\[9, 8\]"),
        ({"weight": torch.zeros(9, 8, 1)}, r"weight=\[9, 8, 1\]"),
        ({"hidden": torch.zeros(2, 2, 8)}, r"targets=.* \[4\] .* must have shape \[2, 2\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets=torch.int32 .* torch.int64"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, "hidden=torch.int64 .* torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias=.* must have shape \[9\]"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive and finite"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": torch.ones(3)}, r"temperature=torch.float32 \[3\].* shape \[4\]"),
        ({"softcap": -1.0}, "softcap=-1.0: must be positive and finite"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    hidden, weight, targets, _ = inputs(4, 8, 9)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_a_shard_of_the_weight_is_refused_with_the_way_to_gather_it() -> None:
    hidden, weight, targets, _ = inputs(4, 8, 9)
    shard, gathered = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(weight.clone())
    # DeepSpeed leaves ds_shape there while a weight is gathered.
    shard.ds_shape = gathered.ds_shape = weight.shape
    with pytest.raises(ValueError, match="GatheredParameters"):
        token_logprobs(hidden, shard, targets)
    found = logprobs_of(hidden, gathered, targets)
    assert torch.equal(found, logprobs_of(hidden, weight, targets))
    weight.full_tensor = lambda: weight
    with pytest.raises(ValueError, match="full_tensor"):
        token_logprobs(hidden, weight, targets)


@pytest.mark.gpu
def test_a_gpu_agrees_with_float64() -> None:
    hidden, weight, targets, bias = inputs(300, 96, 1000)
    exact = token_logprobs(hidden.double(), weight.double(), targets, bias=bias, entropy=True)
    on_cpu = token_logprobs(hidden, weight, targets, bias=bias, entropy=True)
    on_gpu = token_logprobs(
        hidden.cuda(), weight.cuda(), targets.cuda(), bias=bias.cuda(), entropy=True
    )
    for gpu, cpu, truth in zip(on_gpu[:2], on_cpu[:2], exact[:2], strict=True):
        cpu_error = (cpu.double() - truth).abs().max()
        assert (gpu.cpu().double() - truth).abs().max() <= 2 * cpu_error + 1e-6
