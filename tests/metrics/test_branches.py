"""Branch shares against a loop over tokens, and where each loss puts its gradient."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_rl.losses import find_algorithm, make_inputs
from moe_rl.metrics.branches import HIGH, LOW, PLACES, SIGNS, branch_shares

SIX = [f"branch/{sign}_{place}" for sign, place in product(SIGNS, PLACES)]


def random_tokens(seed: int = 0, batch: int = 20, length: int = 6) -> dict[str, Tensor]:
    """Arguments of `branch_shares`: ragged, ratios on all sides of the range, NaN in padding."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch,), generator=draw)[:, None]

    def normal(scale: float) -> Tensor:
        values = scale * torch.randn(batch, length, generator=draw, dtype=torch.float64)
        return values.masked_fill(~mask, math.nan)

    return {
        "gradient": normal(1.0),
        "log_ratio": normal(0.5),
        "advantages": normal(1.0),
        "mask": mask,
        "flipped": torch.rand(batch, length, generator=draw) > 0.5,
    }


def by_loop(tokens: dict[str, Tensor]) -> dict[str, float]:
    found = dict.fromkeys((name + tail for name in SIX for tail in ("", "_flipped")), 0.0)
    masses = []
    for row, column in tokens["mask"].nonzero().tolist():
        gradient, log_ratio, advantage, flipped = (
            tokens[name][row, column].item()
            for name in ("gradient", "log_ratio", "advantages", "flipped")
        )
        ratio, mass = math.exp(log_ratio), abs(gradient)
        place = "above" if ratio > 1.27 else "below" if ratio < 0.8 else "inside"
        name = f"branch/{'positive' if advantage > 0 else 'negative'}_{place}"
        found[name] += mass
        found[f"{name}_flipped"] += mass if flipped else 0.0
        masses.append(mass)
    shares = {name: mass / sum(masses) for name, mass in found.items()}
    return shares | {"branch/largest_token": max(masses) / sum(masses)}


@pytest.mark.parametrize("seed", range(5))
def test_shares_equal_a_loop_over_tokens(seed: int) -> None:
    tokens = random_tokens(seed)
    shares = branch_shares(**tokens)
    expected = by_loop(tokens)
    assert shares.keys() == expected.keys()
    assert shares == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert sum(shares[name] for name in SIX) == pytest.approx(1.0, rel=1e-12)
    assert all(0.0 < shares[name] < 1.0 for name in SIX), "every branch is met"


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    ("ratio", "place"),
    [
        (0.0, "below"),
        (1 - LOW - 1e-9, "below"),
        (1 - LOW + 1e-9, "inside"),
        (1.0, "inside"),
        (1 + HIGH - 1e-9, "inside"),
        (1 + HIGH + 1e-9, "above"),
        (math.inf, "above"),
    ],
)
@pytest.mark.parametrize("flipped", [False, True])
def test_a_token_lands_in_exactly_one_branch(
    sign: str, ratio: float, place: str, flipped: bool
) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    advantage = one if sign == "positive" else -one
    shares = branch_shares(-3 * one, (ratio * one).log(), advantage, one > 0, (one > 0) == flipped)
    name = f"branch/{sign}_{place}"
    own = {name, "branch/largest_token"} | ({f"{name}_flipped"} if flipped else set())
    assert shares == {key: float(key in own) for key in shares}


def test_only_the_proportions_of_gradients_count() -> None:
    """A loss of another divisor, or of a gradient scaler, has the same shares."""
    tokens = random_tokens()
    shares = branch_shares(**tokens)
    for scale in (-1.0, 65536.0, 1e-200, 1e200):
        scaled = branch_shares(**tokens | {"gradient": scale * tokens["gradient"]})
        assert scaled == pytest.approx(shares, rel=1e-12)


def test_what_padding_holds_moves_no_share() -> None:
    tokens = random_tokens()
    shares = branch_shares(**tokens)
    for value in (0.0, 1e9, -math.inf):
        filled = {
            name: tensor
            if tensor.dtype == torch.bool
            else tensor.masked_fill(tensor.isnan(), value)
            for name, tensor in tokens.items()
        }
        assert branch_shares(**filled) == shares


def test_without_a_gradient_every_share_is_zero() -> None:
    tokens = random_tokens()
    shares = branch_shares(**tokens | {"gradient": torch.zeros_like(tokens["gradient"])})
    assert set(shares.values()) == {0.0}


def test_an_infinite_gradient_is_not_a_number_where_it_is() -> None:
    tokens = random_tokens()
    row, column = tokens["mask"].nonzero()[0].tolist()
    for name, value in (("gradient", -math.inf), ("log_ratio", 800.0), ("advantages", -1.0)):
        tokens[name][row, column] = value
    tokens["flipped"][row, column] = False
    shares = branch_shares(**tokens)
    wrong = {name for name, share in shares.items() if math.isnan(share)}
    assert wrong == {"branch/negative_above", "branch/largest_token"}


def test_a_batch_without_a_token_has_no_shares() -> None:
    tokens = random_tokens()
    tokens["mask"] = torch.zeros_like(tokens["mask"])
    assert all(math.isnan(share) for share in branch_shares(**tokens).values())


def corners(batch: int = 6) -> dict[str, Tensor]:
    """Arguments of `make_inputs`: responses of six tokens, each with ratios on all three sides.

    One response of each sign is all below the range, one inside, and one above it in the mean.
    """
    spread = torch.tensor([-2.0, -0.5, -0.1, 0.1, 0.5, 2.0], dtype=torch.float64)
    shift = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).repeat(2)
    old = torch.full((batch, 6), -4.0, dtype=torch.float64)
    return {
        "logprobs": old + spread + shift[:, None],
        "old_logprobs": old,
        "advantages": torch.tensor([1.0, 0.5, 2.0, -1.0, -0.5, -2.0], dtype=torch.float64),
        "mask": torch.ones(batch, 6, dtype=torch.bool),
    }


def gradient_of(algorithm: str, batch: dict[str, Tensor], **options: float) -> Tensor:
    logprobs = batch["logprobs"].clone().requires_grad_()
    inputs = make_inputs(**batch | {"logprobs": logprobs})
    find_algorithm(algorithm).loss(inputs, **options).sum().backward()
    assert logprobs.grad is not None
    return logprobs.grad


def shares_of(
    algorithm: str, batch: dict[str, Tensor] | None = None, **options: float
) -> dict[str, float]:
    batch = batch or corners()
    return branch_shares(
        gradient_of(algorithm, batch, **options),
        batch["logprobs"] - batch["old_logprobs"],
        batch["advantages"][:, None].expand_as(batch["mask"]),
        batch["mask"],
        torch.zeros_like(batch["mask"]),
    )


def empty(shares: dict[str, float]) -> set[str]:
    return {name.removeprefix("branch/") for name in SIX if shares[name] == 0.0}


def test_grpos_clip_leaves_no_mass_in_two_branches_and_most_in_the_unbounded_one() -> None:
    shares = shares_of("grpo")
    assert empty(shares) == {"positive_above", "negative_below"}
    assert shares["branch/negative_above"] > 0.5


def test_on_policy_all_mass_is_inside() -> None:
    batch = corners()
    shares = shares_of("grpo", batch | {"old_logprobs": batch["logprobs"]})
    assert shares["branch/positive_inside"] + shares["branch/negative_inside"] == 1.0


def test_dual_clip_bounds_the_unbounded_branch() -> None:
    """A token of it weighs at most `bound` times its advantage, and nothing beyond the bound."""
    batch = corners()
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    above = (batch["advantages"][:, None] < 0) & (ratio > 1.27)
    for bound in (1.5, 3.0, 10.0):
        gradient = gradient_of("dual_clip", batch, bound=bound)
        weight = gradient.abs() / batch["advantages"].abs()[:, None]
        assert weight[above].max() <= bound
        assert not gradient[above & (ratio > bound)].any()
    open_end, bounded = shares_of("grpo"), shares_of("dual_clip")
    assert 0.0 < bounded["branch/negative_above"] < open_end["branch/negative_above"]
    assert empty(shares_of("dual_clip", bound=1.2)) >= {"negative_above"}
    assert shares_of("dual_clip", bound=1e9) == open_end


def test_gspo_keeps_or_drops_whole_responses_wherever_their_tokens_are() -> None:
    batch = corners()
    gradient = gradient_of("gspo", batch)
    kept = (gradient != 0).any(1)
    assert torch.equal(gradient, gradient[:, :1].expand_as(gradient)), "one weight a response"
    # Of A > 0 the response above the range goes, of A < 0 the one below it.
    assert kept.tolist() == [True, True, False, False, True, True]
    assert not empty(shares_of("gspo"))


def test_a_mask_of_the_ratio_of_trainer_to_engine_takes_tokens_of_both_signs() -> None:
    """IcePop's, where the engine said what the new policy says: rho is 1/w."""
    batch = corners()
    engine = batch | {"rollout_logprobs": batch["logprobs"]}
    shares = shares_of("icepop", engine, lowest=1 / 1.27, highest=1 / 0.8)
    assert empty(shares) == {
        "positive_above", "positive_below", "negative_above", "negative_below"
    }  # fmt: skip
    assert empty(shares_of("icepop", engine, lowest=0.0001, highest=1e4)) == empty(
        shares_of("grpo")
    )


def test_positive_advantages_only_leave_no_negative_branch() -> None:
    assert empty(shares_of("positive_only")) == {
        "positive_above", "negative_below", "negative_inside", "negative_above"
    }  # fmt: skip
