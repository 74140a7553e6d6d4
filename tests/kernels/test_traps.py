"""What went wrong in other implementations of fused log-probabilities, one test a trap.

docs/kernels.md lists them with their sources; each name here says what must not happen.
"""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from problems import DEVICE, FUSED, logprobs_of, problem, solve, truth
from torch import Tensor

from moe_rl.kernels import token_logprobs

BACKENDS = ("reference", *FUSED)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("level", [-60.0, -1e4])
@pytest.mark.parametrize("vocab", [1, 127, 130, 2050])
def test_rows_of_low_logits_are_exact(backend: str, vocab: int, level: float) -> None:
    """verl #2656: words past the vocabulary had logit 0, which shows on low logits alone.

    SkyRL #2141: a running maximum that starts at 0 makes every exponential vanish.
    """
    p = problem(4, 8, vocab, bias=True)
    assert p.bias is not None
    p.bias.add_(level)
    found, exact = solve(p, backend), truth(p)
    assert all(value.isfinite().all() for value in found.values())
    atol = 3e-5 if level > -1e3 else 5e-3  # a float32 near 1e4 has steps of 1e-3
    torch.testing.assert_close(found["logprobs"].double(), exact["logprobs"], rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [0, 1, 2])
def test_each_output_has_a_gradient_of_its_own(backend: str, output: int) -> None:
    """TRL #6625: that of the entropy (1) was dropped in silence. All reach the bias as well."""
    p = problem(5, 8, 300, bias=True)
    p.upstream[[row for row in range(3) if row != output]] = 0
    found, exact = solve(p, backend), truth(p)
    assert exact["d hidden"].norm() > 0.1
    for name in ("d hidden", "d weight", "d bias"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_has_its_own_upstream_gradient(backend: str) -> None:
    """Liger #1298: all tokens were scaled by the first one's."""
    p = problem(6, 8, 200)
    p.upstream[1:] = 0
    p.upstream[0] = torch.tensor([1.0, 0.0, -2.0, 1e-3, 50.0, 0.5], device=DEVICE)
    together = solve(p, backend)["d hidden"]
    p.upstream[0] = 1.0
    alone = solve(p, backend)["d hidden"]
    scale = torch.tensor([1.0, 0.0, -2.0, 1e-3, 50.0, 0.5], device=DEVICE)
    torch.testing.assert_close(together, alone * scale.unsqueeze(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("gap", [4.6, 9.2, 13.8])
def test_a_likely_target_keeps_its_gradient(backend: str, gap: float) -> None:
    """Liger #1329: 1 - p in low precision is 20% off at p = 0.99, and 0 soon after."""
    vocab = 50
    hidden = torch.ones(1, 1, device=DEVICE)
    weight = torch.zeros(vocab, 1, device=DEVICE)
    weight[7] = gap + math.log(vocab - 1)
    target = torch.tensor([7], device=DEVICE)
    leaf = weight.clone().requires_grad_()
    logprobs_of(hidden, leaf, target, backend=backend).sum().backward()
    exact = weight.double().requires_grad_()
    logprobs_of(hidden.double(), exact, target, backend="reference").sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad[7].double(), exact.grad[7], rtol=3e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_no_logprob_is_above_zero(backend: str, scale: float) -> None:
    """The target's score and the logsumexp round apart unless they share the same number."""
    p = problem(200, 48, 40, scale=scale)
    best = (p.hidden @ p.weight.T).argmax(1)
    logprobs = logprobs_of(p.hidden, p.weight, best, backend=backend)
    assert logprobs.max() <= 0


@pytest.mark.parametrize("backend", FUSED)
def test_bfloat16_inputs_are_computed_in_float32(backend: str) -> None:
    """Rounded logits cost 0.03 to 0.11 nats; in sums of gradients each addition would round."""
    p = problem(300, 16, 9000, scale=2.0, dtype=torch.bfloat16)
    found, exact = solve(p, backend), truth(p)
    assert (found["logprobs"].double() - exact["logprobs"]).abs().max() < 1e-5
    for name in ("d hidden", "d weight"):
        off = (found[name].double() - exact[name]).abs()
        assert (off <= 2**-8 * exact[name].abs() + 1e-3 * exact[name].abs().mean()).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [[1, 2, 5, 6, 7], []])
@pytest.mark.parametrize("filling", ["NaN", "large"])
def test_padding_may_hold_anything(backend: str, kept: list[int], filling: str) -> None:
    """exp(100 - 0) of an ignored row times its slope of 0 is inf * 0; so is a division by 0."""
    temperature = torch.linspace(0.5, 2, 9).to(DEVICE)
    p = problem(9, 8, 300, bias=True, temperature=temperature)
    assert p.bias is not None
    expected = None
    if filling == "large":
        p.bias.add_(100.0)
    if kept:
        expected = solve(p.rows(torch.tensor(kept, device=DEVICE)), backend)
    ignored = torch.tensor([row for row in range(9) if row not in kept], device=DEVICE)
    p.targets[ignored] = -100
    if filling == "NaN":
        p.hidden[ignored], p.upstream[:, ignored] = torch.nan, torch.inf
    else:
        temperature[ignored] = 0.0
    found = solve(p, backend)
    for name, value in found.items():
        of_tokens = len(value) == 9
        assert (value[ignored] == 0).all() if of_tokens else kept or (value == 0).all(), name
        if expected is not None:
            ours = value[kept] if of_tokens else value
            torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_removes_words(backend: str) -> None:
    """A whole tile of removed words: a maximum of -inf would give -inf - -inf."""
    p = problem(5, 8, 700, bias=True)
    p.targets.clamp_(0, 99)
    assert p.bias is not None
    p.bias[100:] = -torch.inf
    p.upstream[1] = 40.0  # times the lowest float it would overflow
    found = solve(p, backend)
    fewer = replace(p, weight=p.weight[:100], bias=p.bias[:100])
    for name, value in solve(fewer, "reference").items():
        ours = found[name][:100] if "weight" in name or "bias" in name else found[name]
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_removed_target_has_no_probability_and_spoils_nothing(backend: str) -> None:
    """Its probability, 0, times its score, -inf, is 0 in the entropy and in every slope."""
    p = problem(5, 8, 300, bias=True)
    assert p.bias is not None
    p.bias[p.targets[0]] = -torch.inf
    found, exact = solve(p, backend), truth(p)
    assert found["logprobs"][0] == -torch.inf and found["logprobs"][1:].isfinite().all()
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_equal_calls_give_equal_bits(backend: str, default: torch.dtype) -> None:
    """Whatever the default dtype: sums of parts in bfloat16 cost 0.05 nats unseen."""
    p = problem(140, 40, 4500, scale=3.0, bias=True)
    expected = solve(p, backend)
    torch.set_default_dtype(default)
    try:
        found = solve(p, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "rows",
    [
        *(slice(0, 1), slice(0, 65), slice(64, 150)),
        # The interpreter multiplies by NumPy, whose rounding depends on the place in a tile.
        pytest.param(slice(3, 80), marks=pytest.mark.gpu),
    ],
)
def test_a_token_does_not_depend_on_its_batch(rows: slice) -> None:
    """The Triton forward to the bit: parts of the vocabulary are cut by V alone."""
    p = problem(150, 40, 4500, scale=3.0, bias=True)
    whole, part = solve(p, "triton"), solve(p.rows(rows), "triton")
    for name in ("logprobs", "entropy", "lse"):
        assert torch.equal(whole[name][rows], part[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_embedding_gets_both_gradients(backend: str) -> None:
    def embedding_gradient(chosen: str, dtype: torch.dtype) -> Tensor:
        table = problem(1, 8, 60).weight.to(dtype).requires_grad_()
        ids = torch.tensor([3, 59, 0, 3], device=DEVICE)
        logprobs_of(table[ids].tanh(), table, ids.flip(0), backend=chosen).sum().backward()
        assert table.grad is not None
        return table.grad

    exact = embedding_gradient("reference", torch.float64)
    ours = embedding_gradient(backend, torch.float32)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_has_its_own_temperature(backend: str) -> None:
    p = problem(5, 8, 300)
    values = torch.tensor([0.2, 0.7, 1.0, 2.0, 9.0], device=DEVICE)
    together = logprobs_of(p.hidden, p.weight, p.targets, temperature=values, backend=backend)
    for i, value in enumerate(values.tolist()):
        row = slice(i, i + 1)
        alone = logprobs_of(
            *(p.hidden[row], p.weight, p.targets[row]), temperature=value, backend=backend
        )
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-6)


def test_offsets_past_two_to_the_31_are_read_right() -> None:
    """Three rows, 2^30 numbers apart; the memory between them is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    weight = far.as_strided((3, 8), (2**30, 1))
    p = problem(4, 8, 3, dtype=torch.float16)
    weight.copy_(p.weight)
    near = logprobs_of(p.hidden, p.weight, p.targets, backend="triton")
    assert torch.equal(logprobs_of(p.hidden, weight, p.targets, backend="triton"), near)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "vocab"), [(16, 8192), (8192, 16)])
def test_offsets_of_many_tokens_are_read_right(width: int, vocab: int) -> None:
    """N * H, and N * the words of a strip, pass 2^31."""
    p = problem(300_000, width, vocab, dtype=torch.bfloat16)
    last = slice(len(p.targets) - 100, None)
    whole, part = solve(p, "triton"), solve(p.rows(last), "triton")
    for name in ("logprobs", "entropy", "lse", "d hidden"):
        torch.testing.assert_close(whole[name][last], part[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_grid_has_one_axis() -> None:
    """A second axis ends at 65535 programs."""
    from moe_rl.kernels import triton_backward, triton_logprobs

    grids: list[tuple[int, ...]] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return lambda *args, **kwargs: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_logprobs, "_forward_kernel", Spy())
        patch.setattr(triton_backward, "_strip_kernel", Spy())
        solve(problem(130, 8, 70_000), "triton")
    assert len(grids) > 1 and all(len(grid) == 1 for grid in grids)


@pytest.mark.parametrize("backend", FUSED)
def test_a_frozen_head_costs_no_weight_gradient(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_rl.kernels import chunked, triton_backward

    calls = SimpleNamespace(shapes=[])
    product = chunked.product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.shapes.append((a.shape[0], b.shape[1]))
        return product(a, b)

    monkeypatch.setattr(chunked, "product", counted)  # scores go through that of chunks.py
    monkeypatch.setattr(triton_backward, "_product", counted)
    p = problem(6, 8, 300)
    hidden = p.hidden.clone().requires_grad_()
    logprobs_of(hidden, p.weight, p.targets, backend=backend).sum().backward()
    assert (300, 8) not in calls.shapes and (6, 8) in calls.shapes
    assert hidden.grad is not None and p.weight.grad is None


INDUCTOR = pytest.param(
    *("chunked", "inductor"),
    marks=pytest.mark.skipif(
        shutil.which("g++") is None and DEVICE == "cpu", reason="Inductor needs a C++ compiler"
    ),
)


@pytest.mark.parametrize(
    ("backend", "compiler"), [*((backend, "aot_eager") for backend in BACKENDS), INDUCTOR]
)
def test_compiled_calls_stay_in_float32(backend: str, compiler: str) -> None:
    """Liger #1362: Inductor turned Python floats into float64. One graph, without a break."""
    p = problem(5, 8, 300)

    @torch.compile(backend=compiler, fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return token_logprobs(
            *(hidden, weight, p.targets),
            temperature=0.7,
            softcap=3.0,
            entropy=True,
            return_lse=True,
            backend=backend,
        )

    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    outputs = compiled(hidden, weight)
    sum((o * u).sum() for o, u in zip(outputs, p.upstream, strict=True)).backward()
    p.settings.update(temperature=0.7, softcap=3.0)
    expected = solve(p, backend)
    for name, ours in zip(expected, (*outputs, hidden.grad, weight.grad), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.detach(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("onednn", [True, False])
def test_autocast_does_not_change_the_fused_results(backend: str, onednn: bool) -> None:
    """With and without the products of oneDNN, which autocast does not know."""
    p = problem(8, 16, 300)
    with torch.backends.mkldnn.flags(enabled=onednn):
        expected = solve(p, backend)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = solve(p, backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("backend", "compiler"), [*((backend, "aot_eager") for backend in FUSED), INDUCTOR]
)
def test_compiled_gradients_lie_as_they_are_said_to(backend: str, compiler: str) -> None:
    """Of inputs column by column; Inductor compares the strides of what it was told."""
    p = problem(6, 8, 300)
    leaves = [t.t().contiguous().t().requires_grad_() for t in (p.hidden, p.weight)]
    compiled = torch.compile(
        lambda hidden, weight: logprobs_of(hidden, weight, p.targets, backend=backend),
        backend=compiler,
        fullgraph=True,
    )
    (compiled(*leaves) * p.upstream[0]).sum().backward()
    p.upstream[1:] = 0
    expected = solve(p, backend)
    for leaf, name in zip(leaves, ("d hidden", "d weight"), strict=True):
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_takes_another_temperature(backend: str) -> None:
    p = problem(6, 8, 300)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden: Tensor, temperature: float, softcap: float) -> Tensor:
        settings = {"temperature": temperature, "softcap": softcap}
        return logprobs_of(hidden, p.weight, p.targets, backend=backend, **settings)

    for temperature, softcap in ((0.7, 5.0), (0.8, 6.0), (1.3, 7.0)):
        settings = {"temperature": temperature, "softcap": softcap}
        expected = logprobs_of(p.hidden, p.weight, p.targets, backend=backend, **settings)
        found = compiled(p.hidden, temperature, softcap)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_a_second_derivative_says_where_there_is_one(backend: str) -> None:
    p = problem(4, 8, 300)
    hidden = p.hidden.clone().requires_grad_()
    logprobs = logprobs_of(hidden, p.weight, p.targets, backend=backend)
    (slope,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"for second derivatives use .*'reference'"):
        slope.sum().backward()


@pytest.mark.gpu
def test_a_gpu_repeats_itself_to_the_bit() -> None:
    """Races, which a serial interpreter cannot have."""
    p = problem(2000, 256, 50_021, dtype=torch.bfloat16)
    first = solve(p, "triton")
    for _ in range(5):
        again = solve(p, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_bias_and_temperature_may_have_any_layout(backend: str, layout: str) -> None:
    """A kernel that takes them for dense reads the wrong numbers, or past their end."""
    p = problem(5, 8, 300)
    bias = torch.randn(600, device=DEVICE)[::2]
    if layout == "expanded":
        bias = torch.ones(1, device=DEVICE).expand(300)
    temperature = (torch.rand(10, device=DEVICE) + 0.5)[::2]
    if layout == "expanded":
        temperature = torch.tensor(0.7, device=DEVICE)
    settings = {"bias": bias, "temperature": temperature, "entropy": True, "return_lse": True}
    found = token_logprobs(p.hidden, p.weight, p.targets, backend=backend, **settings)
    expected = token_logprobs(p.hidden, p.weight, p.targets, backend="reference", **settings)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_word_of_the_head_makes_every_log_prob_nan(backend: str) -> None:
    """On a GPU Triton's maximum drops NaN; its interpreter does not, and cannot show it."""
    p = problem(40, 32, 300)
    p.targets[:] = 3
    p.weight[200] = torch.nan
    found = solve(p, backend)
    assert found["logprobs"].isnan().all() and found["entropy"].isnan().all()
