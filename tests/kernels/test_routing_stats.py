"""`routing_statistics` against `moe_rl.routing.statistics`, where each metric is defined."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DEVICE

from moe_rl.kernels import routing_statistics
from moe_rl.metrics import instruments
from moe_rl.routing import statistics
from moe_rl.runtime.choice import Choice

BACKENDS = ("reference", "triton")


def routing(
    tokens: int, experts: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without ties [tokens, E], and a record of which half the rows are the live choice."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=draw)
    record = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(tokens)])
    record[::2] = logits.topk(top_k, dim=-1).indices[::2].flip(-1)
    return logits.to(DEVICE), record.to(torch.int16).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 8),
    unrecorded=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_each_statistic_is_that_of_the_routing_room(
    backend: str, tokens: int, experts: int, top_k: int, unrecorded: int, seed: int
) -> None:
    top_k = min(top_k, experts)
    logits, record = routing(tokens, experts, top_k, seed)
    record[:unrecorded, -1] = -1
    found = routing_statistics(logits, record, backend=backend)
    live = logits.topk(top_k, dim=-1).indices
    assert torch.equal(found.live_experts.long(), live)
    one_layer, record_layer = logits.unsqueeze(-2), record.unsqueeze(-2)
    expected = {
        "churn": statistics.churn(record_layer, live.unsqueeze(-2)),
        "margin": statistics.margin(one_layer, top_k),
        "entropy": statistics.entropy(one_layer),
    }
    for name, value in expected.items():
        ours = getattr(found, name)
        torch.testing.assert_close(
            ours, value.squeeze(-1), rtol=1e-5, atol=2e-6, equal_nan=True, msg=name
        )
    mass = statistics.confidence(one_layer, record_layer).squeeze(-1)
    ours = found.replay_weights.sum(-1)
    known = ~mass.isnan()
    torch.testing.assert_close(ours[known], mass[known], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_a_record_get_the_weights_of_their_live_choice(backend: str) -> None:
    logits, record = routing(5, 9, 3)
    record[2] = -1
    found = routing_statistics(logits, record, backend=backend)
    expected = logits[2].softmax(-1)[found.live_experts[2].long()]
    torch.testing.assert_close(found.replay_weights[2], expected)
    assert found.churn[2].isnan() and not found.churn[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_that_cannot_be_chosen_adds_no_nan(backend: str) -> None:
    logits, _ = routing(6, 9, 2)
    logits[:, 4:] = -torch.inf
    record = torch.tensor([0, 3], device=DEVICE).expand(6, 2)
    found = routing_statistics(logits, record, backend=backend)
    fewer = routing_statistics(logits[:, :4], record, backend=backend)
    for ours, theirs in zip(found, fewer, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_possible_experts_than_choices(backend: str) -> None:
    """The choice still names K different experts, and its margin is that of its logits."""
    logits = torch.full((1, 6), -torch.inf, device=DEVICE)
    logits[0, 3], logits[0, 5] = 1.0, 0.0
    record = torch.tensor([[3, 5, 0, 1]], device=DEVICE)
    found = routing_statistics(logits, record, backend=backend)
    live = found.live_experts[0].tolist()
    assert live[:2] == [3, 5] and len(set(live)) == 4
    assert found.churn.item() == len(set(live) - {3, 5, 0, 1}) / 4
    assert found.margin.isnan().all()  # -inf - -inf
    two = routing_statistics(logits, record[:, :2], backend=backend)
    assert two.margin.item() == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_that_names_an_expert_twice_is_a_set(backend: str) -> None:
    logits = torch.arange(5.0, device=DEVICE).unsqueeze(0)
    record = torch.tensor([[4, 4]], device=DEVICE)
    assert routing_statistics(logits, record, backend=backend).churn.item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_ids_of_any_integer_type(backend: str, dtype: torch.dtype) -> None:
    """E = 256 does not fit 8 bits, and -1 not uint8."""
    logits, record = routing(6, 256, 4)
    record = record.remainder(100)
    expected = routing_statistics(logits, record.long(), backend="reference")
    found = routing_statistics(logits, record.to(dtype), backend=backend)
    for name in ("churn", "replay_weights"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.skipif(DEVICE == "cuda", reason="looking at the ids would drain the queue")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", [5, 2**32 + 3])
def test_an_id_beyond_the_experts_is_refused(backend: str, expert: int) -> None:
    record = torch.tensor([[0, expert]])
    with pytest.raises(ValueError, match=f"routed_experts={expert}: ids must lie below 5"):
        routing_statistics(torch.zeros(1, 5), record, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_a_nan_has_no_numbers_and_spoils_no_other(backend: str) -> None:
    logits, record = routing(4, 9, 2)
    clean = routing_statistics(logits, record, backend=backend)
    logits[1, 5] = torch.nan
    found = routing_statistics(logits, record, backend=backend)
    for name in ("margin", "entropy", "replay_weights"):
        value, expected = getattr(found, name), getattr(clean, name)
        assert value[1].isnan().all(), name
        assert torch.equal(value[[0, 2, 3]], expected[[0, 2, 3]]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_axes_and_half_precision_logits(backend: str) -> None:
    logits, record = routing(24, 16, 4)
    flat = routing_statistics(logits.bfloat16(), record, backend=backend)
    shaped = routing_statistics(
        *(logits.bfloat16().view(2, 3, 4, 16), record.view(2, 3, 4, 4)), backend=backend
    )
    for one, other in zip(flat, shaped, strict=True):
        assert torch.equal(one.view(other.shape), other) and one.dtype != torch.bfloat16


def test_the_instruments_report_the_same_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`instruments.py` asks for one pass where the logits are on a GPU; here it is made to."""
    logits, record = routing(2 * 3 * 4, 16, 4)
    logits, record = logits.view(2, 3, 4, 16), record.view(2, 3, 4, 4)
    record[1, 0, 2] = -1
    mask = torch.tensor([[True, True, False], [True, False, True]], device=DEVICE)
    one_by_one = instruments.router_statistics(logits.cpu(), record.cpu(), mask.cpu())
    chosen = Choice("triton", "made to, for the test")
    monkeypatch.setattr(instruments, "choose_routing_backend", lambda *of: chosen)
    for backend in BACKENDS:
        statistic = partial(routing_statistics, backend=backend)
        monkeypatch.setattr(instruments, "routing_statistics", statistic)
        together = instruments.router_statistics(logits, record, mask)
        assert together.keys() == one_by_one.keys()
        for name, value in one_by_one.items():
            torch.testing.assert_close(
                together[name].cpu(), value, rtol=1e-5, atol=2e-6, equal_nan=True, msg=name
            )


def test_bad_shapes_are_named() -> None:
    logits, record = routing(4, 3, 2)
    for bad in ((logits, record[:3]), (logits[:, :1], record), (logits, record.float())):
        with pytest.raises(ValueError, match=r"router_logits=.*routed_experts=.*must be floating"):
            routing_statistics(*bad)
    with pytest.raises(ValueError, match="backend='chunked': unknown"):
        routing_statistics(logits, record, backend="chunked")
