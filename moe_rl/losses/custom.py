"""Your own loss: a function of `LossInputs` in a file of yours, checked before a run is made.

moe-rl train --loss my_loss.py:my_loss
"""

import functools
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_rl.losses import Algorithm, LossFunction, LossInputs, find_algorithm, make_inputs
from moe_rl.runtime.own_code import OwnFunction, load_function, one_line_errors
from moe_rl.runtime.strict import ConfigError


def choose_algorithm(algorithm: str, loss: str | None, sha256: str | None = None) -> Algorithm:
    """The algorithm of that name, or the one of the user's own `loss`, which takes its place.

    Raises:
        ValueError: see `find_algorithm` and `load_loss`.
    """
    return find_algorithm(algorithm) if loss is None else load_loss(loss, sha256)


def load_loss(name: str, sha256: str | None = None) -> Algorithm:
    """The loss FILE.py:FUNCTION, with its options and the SHA-256 of its file.

    The function takes `LossInputs` and gives the loss of each token, [B, T]; its keyword-only
    arguments are its options. Router logits are recorded for it where the file names router_shift.
    Called, it raises ConfigError with the line of the file for whatever goes wrong there.

    Args:
        name: FILE.py:FUNCTION.
        sha256: of the file, in hexadecimal digits; None: not checked.

    Raises:
        ConfigError: the file cannot be read or run, has another sha256 or no such function, or the
            function takes something else than inputs and options that are numbers.
    """
    own = load_function("loss", name, sha256)
    _check_arguments(name, own)
    reads_routers = b"router_shift" in own.source
    return Algorithm(_named(name, own), reads_routers=reads_routers, sha256=own.sha256)


def check_loss(name: str, algorithm: Algorithm, options: Mapping[str, float]) -> None:
    """Try a user's own loss on small random inputs, on policy and off it, with padding.

    Raises:
        ConfigError: an error in the file, another shape than [B, T], inputs changed in place, a NaN
            or inf in the loss or its gradient, or no gradient anywhere.
    """
    reached = False
    for policy, spread in (("on policy", 0.0), ("off policy", 0.5)):
        logprobs, inputs = _small_inputs(spread, algorithm.reads_routers)
        tensors = {key: value for key, value in vars(inputs).items() if isinstance(value, Tensor)}
        before = {key: value.clone() for key, value in tensors.items()}
        token_losses = algorithm.loss(inputs, **options)
        for key, value in tensors.items():
            if not value.equal(before[key]):
                raise ConfigError(
                    f"loss={name!r}: changes inputs.{key} in place, and metrics read it after the "
                    "loss; work on a copy"
                )
        if token_losses.requires_grad:
            with one_line_errors(f"loss={name!r}", name.rpartition(":")[0]):
                token_losses[inputs.mask].sum().backward()
        gradient = torch.zeros(()) if logprobs.grad is None else logprobs.grad
        for what, values in (("loss", token_losses[inputs.mask]), ("gradient", gradient)):
            if not values.isfinite().all():
                raise ConfigError(
                    f"loss={name!r}: its {what} is NaN or inf {policy} on small random inputs; "
                    "guard the divisions and logarithms"
                )
        if not token_losses.requires_grad:
            break
        reached |= bool(gradient.any())
    if not token_losses.requires_grad or not reached:
        raise ConfigError(
            f"loss={name!r}: no gradient reaches inputs.logprobs; compute the loss from it, "
            "without detach or no_grad"
        )


def _check_arguments(name: str, own: OwnFunction) -> None:
    """Refuse a function that cannot be called with inputs and options alone."""
    with own.errors():
        signature = inspect.signature(own.function)
    called = name.rpartition(":")[2]
    parameters = [*signature.parameters.values()]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 1 or len(parameters) != 1 + len(options):
        raise ConfigError(
            f"loss={name!r}: its arguments are {signature}; take inputs alone, and options behind "
            f"a star, as in {called}(inputs, *, clip=0.2)"
        )
    for option in options:
        if type(option.default) not in (int, float):
            raise ConfigError(
                f"loss={name!r}: the option {option.name!r} has no number for a default; give it "
                f"one, as in {option.name}=0.2"
            )


def _named(name: str, own: OwnFunction) -> LossFunction:
    """The function, whose errors name its file, and whose result has the shape of its inputs."""

    @functools.wraps(own.function)
    def loss(inputs: LossInputs, **options: float) -> Tensor:
        with own.errors():
            token_losses = own.function(inputs, **options)
        is_tensor = isinstance(token_losses, Tensor)
        found = list(token_losses.shape) if is_tensor else type(token_losses).__name__
        expected = list(inputs.mask.shape)
        if found != expected:
            raise ConfigError(
                f"loss={name!r}: returned {found} for inputs of shape {expected}; return the loss "
                "of each token, [B, T], without a mean"
            )
        return token_losses

    return loss


def _small_inputs(spread: float, router_shift: bool) -> tuple[Tensor, LossInputs]:
    """Log-probs, a leaf, and inputs made of them, whose log ratios are `spread` wide (nats).

    Lengths from 1 to 5; advantages of both signs, and 0 as in a group of equal rewards.
    """
    draw = torch.Generator().manual_seed(0)
    advantages = torch.tensor([1.5, -1.0, 0.0, 0.5, -0.5, -0.5])
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5])[:, None]
    logprobs = -3 * torch.rand(mask.shape, generator=draw)
    old = logprobs + spread * torch.randn(mask.shape, generator=draw)
    rollout = old + spread * torch.randn(mask.shape, generator=draw)
    shift = 1 - spread * torch.rand(mask.shape, generator=draw)
    logprobs.requires_grad_()
    return logprobs, make_inputs(
        logprobs,
        old,
        advantages,
        mask,
        rollout_logprobs=rollout,
        router_shift=shift if router_shift else None,
    )
