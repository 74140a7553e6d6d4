"""The fused backends against the definition in float64, over shapes, scales and dtypes."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DEVICE,
    FUSED,
    assert_as_exact_as_torch,
    errors,
    logprobs_of,
    problem,
    solve,
    truth,
)

from moe_rl.kernels import chunks, product, rows, token_logprobs
from moe_rl.kernels.triton_tile import tanh

# Below, at and above the tiles of the kernels (64 and 128 tokens, 128 and 256 words) and the parts
# of the vocabulary (2048 words); no number is a multiple of anything.
SHAPES = [(1, 1, 1), (3, 5, 2), (7, 33, 129), (129, 31, 257), (65, 70, 2049), (30, 130, 4099)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("tokens", "width", "vocab"), SHAPES)
def test_float32_is_as_exact_as_torch(backend: str, tokens: int, width: int, vocab: int) -> None:
    assert_as_exact_as_torch(problem(tokens, width, vocab, scale=3.0, bias=True), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_as_exact_as_torch(backend: str, dtype: torch.dtype) -> None:
    p = problem(40, 64, 700, scale=3.0, bias=True, dtype=dtype)
    assert_as_exact_as_torch(p, backend)
    # Outputs are those of float32 arithmetic on the same numbers, not of half-precision logits.
    found, exact = solve(p, backend), truth(p)
    for name in ("logprobs", "entropy", "lse"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_inputs_of_different_dtypes_meet_in_float32(backend: str) -> None:
    p = problem(9, 16, 300)
    mixed = logprobs_of(p.hidden, p.weight.bfloat16(), p.targets, backend=backend)
    upcast = logprobs_of(p.hidden, p.weight.bfloat16().float(), p.targets, backend=backend)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, upcast, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.6},
        {"temperature": torch.linspace(0.3, 2.0, 21).to(DEVICE)},
        {"softcap": 4.0},
        {"softcap": 2.5, "temperature": torch.linspace(0.3, 2.0, 21).to(DEVICE)},
    ],
    ids=["temperature", "temperature per token", "softcap", "both"],
)
def test_temperature_and_softcap_are_as_exact_as_torch(backend: str, asked: dict) -> None:
    assert_as_exact_as_torch(problem(21, 33, 301, scale=3.0, bias=True, **asked), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [30.0, 1e3, 3e3])
def test_peaked_rows_are_as_exact_as_torch(backend: str, scale: float) -> None:
    assert_as_exact_as_torch(problem(12, 16, 400, scale=scale), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("level", [-1e4, -300.0, 300.0, 1e4])
def test_logits_around_any_level_are_as_exact_as_torch(backend: str, level: float) -> None:
    """A shift of every logit changes no probability: -1e4 to 1e4, all of a row alike."""
    p = problem(6, 8, 300, bias=True)
    assert p.bias is not None
    p.bias.add_(level)
    assert_as_exact_as_torch(p, backend)
    assert (solve(p, backend)["logprobs"] > -30).all()


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=12)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    scale=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    bias=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    ignored=st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_any_problem_agrees_with_the_definition(
    backend: str,
    tokens: int,
    width: int,
    vocab: int,
    scale: float,
    bias: bool,
    temperature: float,
    softcap: float | None,
    ignored: int,
    seed: int,
) -> None:
    p = problem(
        *(tokens, width, vocab),
        scale=scale,
        bias=bias,
        seed=seed,
        temperature=temperature,
        softcap=softcap,
    )
    p.targets[:ignored] = -100
    p.hidden[:ignored] = torch.nan
    found, exact = solve(p, backend), truth(p)
    size = max(1.0, scale) / temperature
    for name, value in exact.items():
        torch.testing.assert_close(
            *(found[name].double(), value), rtol=1e-4, atol=2e-6 * size * (1 + size), msg=name
        )


@pytest.mark.parametrize("backend", FUSED)
def test_the_entropy_is_shifted_before_it_is_summed(backend: str) -> None:
    """log l - u / l. With scores at 1e3 the unshifted lse - sum p s is off by 1e-4."""
    p = problem(20, 16, 500, bias=True)
    assert p.bias is not None
    p.bias.add_(1000.0)
    assert errors(solve(p, backend), truth(p))["entropy"] < 3e-5
    flat = token_logprobs(
        *(torch.zeros_like(p.hidden), p.weight, p.targets), entropy=True, backend=backend
    )
    assert (flat[1] - math.log(500)).abs().max() < 1e-6


def test_float64_is_computed_in_float64() -> None:
    p = problem(9, 16, 5000, bias=True, temperature=0.7, softcap=4.0)
    found, exact = solve(p.to(torch.float64), "chunked"), truth(p)
    unlikely = logprobs_of(
        *(torch.tensor([[0.0, 20.5]]).double(), torch.eye(2).double(), torch.tensor([0])),
        backend="chunked",
    )
    assert abs(unlikely.item() + 20.5 + math.log1p(math.exp(-20.5))) < 1e-14
    for name, value in exact.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_pieces_of_tokens_and_words_make_the_whole(
    backend: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 5 tokens, chunks of 100 words, slabs of 4 tokens, sums of 3 terms."""
    monkeypatch.setattr(chunks, "BLOCK_SCORES", 500)
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 800)
    monkeypatch.setattr(rows, "SLAB_NUMBERS", 32)
    monkeypatch.setattr(product, "MOST_TERMS", 3)
    monkeypatch.setattr(product, "made_by_intel", lambda: False)
    temperature = torch.linspace(0.3, 2.0, 23).to(DEVICE)
    p = problem(23, 8, 301, scale=3.0, bias=True, temperature=temperature, softcap=softcap)
    assert_as_exact_as_torch(p, backend)
    p.targets[::4] = -100
    found, exact = solve(p, backend), truth(p)
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("intel", [False, True])
def test_wide_models_are_as_exact_as_torch(
    width: int, intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy and gradients too, which know no exact target score; by oneDNN and by torch.mm."""
    monkeypatch.setattr(product, "made_by_intel", lambda: intel)
    assert_as_exact_as_torch(problem(64, width, 1500, scale=4.0), "chunked")


@triton.jit
def _tanh_kernel(x, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    tl.store(out + at, tanh(tl.load(x + at)))


def test_tanh_keeps_its_digits_near_zero() -> None:
    """1 - exp(-2x) would cancel: relative errors of 1e-4 at 1e-3."""
    x = torch.logspace(-6, 1.2, 512, device=DEVICE)
    x = torch.cat([x, -x])
    out = torch.empty_like(x)
    _tanh_kernel[(1,)](x, out, 1024)
    exact = x.double().tanh()
    assert ((out.double() - exact).abs() / exact.abs()).max() < 2e-7


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_is_as_exact_as_torch_at_size(dtype: torch.dtype) -> None:
    """TF32 products and half-precision arithmetic, which the interpreter cannot show."""
    p = problem(1000, 1024, 20011, scale=4.0, bias=True, dtype=dtype)
    assert_as_exact_as_torch(p, "triton")
    assert errors(solve(p, "triton"), truth(p))["logprobs"] < 1e-5
