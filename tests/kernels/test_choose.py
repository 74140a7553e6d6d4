"""The one decision point: which backend runs, and the reason it gives."""

import os
import subprocess
import sys

import pytest
import torch
from problems import logprobs_of, problem

from moe_rl.kernels import choose_backend, product, token_logprobs
from moe_rl.kernels.choose import SMALL_LOGITS


def test_few_logits_are_materialised_and_many_are_not() -> None:
    few = choose_backend(num_tokens=SMALL_LOGITS // 16, vocab=16)
    many = choose_backend(num_tokens=SMALL_LOGITS // 16 + 1, vocab=16)
    assert few.name == "reference" and "fit into a cache" in few.reason
    assert many.name == "chunked" and "bound the memory" in many.reason


def test_backward_inside_autocast_is_float32() -> None:
    """autograd would take the reference's products of the backward pass in half precision."""
    p = problem(8, 16, 30)
    found = []
    for autocast in (False, True):
        weight = p.weight.clone().requires_grad_()
        with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=autocast):
            logprobs_of(p.hidden, weight, p.targets).sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    few = choose_backend(num_tokens=8, vocab=30, autocast=True)
    assert few.name == "chunked" and "autocast" in few.reason


def test_auto_is_the_backend_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(5, 8, 300)
    monkeypatch.setattr("moe_rl.kernels.choose.SMALL_LOGITS", 100)
    expected = logprobs_of(p.hidden.cpu(), p.weight.cpu(), p.targets.cpu(), backend="chunked")
    found = logprobs_of(p.hidden.cpu(), p.weight.cpu(), p.targets.cpu())
    assert torch.equal(found, expected)


def test_a_gpu_takes_triton_unless_an_input_is_float64() -> None:
    sizes = {"num_tokens": 8192, "vocab": 151936, "device": "cuda"}
    assert choose_backend(**sizes).name == "triton"
    exact = choose_backend(**sizes, dtype=torch.float64)
    assert exact.name == "chunked" and "float64" in exact.reason


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="'cuda': unknown; choose from auto, reference, chunked, triton"
    ):
        choose_backend("cuda", num_tokens=1, vocab=1)


def test_float64_is_not_given_to_triton() -> None:
    p = problem(2, 3, 4).to(torch.float64)
    with pytest.raises(ValueError, match=r"float64; use backend='reference'"):
        token_logprobs(p.hidden, p.weight, p.targets, backend="triton")


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_set() -> None:
    code = (
        "import torch; from moe_rl.kernels import token_logprobs\n"
        "one = torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1, dtype=torch.int64)\n"
        "try: token_logprobs(*one, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "backend='triton': cannot run: the tensors are on cpu" in shown
    assert "set TRITON_INTERPRET=1 before Python starts" in shown


@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 2048, 33), (1, 1, 1), (0, 4, 2), (3, 0, 2)])
@pytest.mark.parametrize("intel", [False, True])
def test_products_are_those_of_float64(
    shape: tuple[int, int, int], intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever library takes them: plain, transposed, and a slice that oneDNN must not get."""
    monkeypatch.setattr(product, "made_by_intel", lambda: intel)
    rows, inner, cols = shape
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(rows, 2 * inner, generator=draw)
    b = torch.randn(cols, inner, generator=draw).T
    for a in (wide[:, :inner].contiguous(), wide[:, :inner].T.contiguous().T, wide[:, :inner]):
        exact = a.double() @ b.double()
        off = (product.product(a, b).double() - exact).abs()
        assert (off <= 1e-6 * (inner + 1) ** 0.5 * 4).all()
