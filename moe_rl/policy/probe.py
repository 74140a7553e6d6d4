"""Whether a model reads prompts and responses rightly in the ways that training reads them.

Most caches hold keys and values by position. Those of linear attention, state spaces and compressed
attention do not: some cannot be repeated for the responses of a group, some continue a prompt
wrongly, and nothing in a config says so. A few made-up tokens do. The truth is one forward pass
over each prompt with its response, without padding and without a cache.

Routes are the truth's in all passes: a near tie that rounding decides would otherwise look like an
error. Shapes: P prompts, G responses to each, B = P * G, Sp prompt and T response positions.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_rl.config import ConfigError
from moe_rl.policy.policy import Policy
from moe_rl.routing import record_routing, replay_routing

_PROMPTS, _RESPONSE, _GROUP = (7, 12), 6, 2  # tokens of each prompt, of a response; responses
# What a model's code raises where it was not made for a way of reading.
_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def check_logits(policy: Policy, name: str) -> None:
    """Refuse a model whose logits are not what log-probs are computed from; errors begin with name.

    Raises:
        ConfigError: they are not those of its head, scaled or capped as its config says; or the
            model does not run.
    """
    ids = _few_tokens(policy)
    with _running(policy, name):
        own = policy.model(input_ids=ids, use_cache=False).logits.float()
        ours = _logits(policy, ids) * policy.temperature
    if own.shape != ours.shape or float((ours - own).norm() / own.norm()) > _tolerance(policy):
        raise ConfigError(
            f"{name}: {type(policy.model).__name__} gives logits that are not its head's product, "
            "scaled or capped as its config says, so its log-probs cannot be computed; take "
            "another model"
        )


@torch.enable_grad()
def has_unused_parameters(policy: Policy) -> bool:
    """Whether some trained parameters get no gradient, as the indexers of sparse attention."""
    _logits(policy, _few_tokens(policy)).logsumexp(-1).sum().backward()
    unused = any(p.requires_grad and p.grad is None for p in policy.model.parameters())
    policy.model.zero_grad(set_to_none=True)
    return unused


def _few_tokens(policy: Policy) -> Tensor:
    """One made-up sequence: int64 [1, 6]."""
    words = policy.model.get_input_embeddings().num_embeddings
    return torch.arange(2, 8, device=policy.device).remainder(words)[None]


def _logits(policy: Policy, ids: Tensor) -> Tensor:
    """Logits of whole sequences without padding, over the policy's temperature."""
    return policy.logits(policy.read_whole(ids, torch.ones_like(ids, dtype=torch.bool)))


@contextlib.contextmanager
def _running(policy: Policy, name: str) -> Iterator[None]:
    """Say in one line that a model does not even read one sequence without a cache."""
    try:
        yield
    except _ERRORS as error:
        raise ConfigError(
            f"{name}: {type(policy.model).__name__} does not run in {policy.model.dtype} "
            f"({error!s:.120}); take another dtype, or another model"
        ) from error


def _tolerance(policy: Policy) -> float:
    """How far two ways to the same numbers may differ, relative to their norm.

    Half the digits of the weights' type: rounding takes fewer, another context or scale more.
    """
    return float(torch.finfo(policy.model.dtype).eps ** 0.5)


@torch.no_grad()
def must_read_whole(policy: Policy, name: str) -> bool:
    """Whether sequences must be read whole because the model's cache does not serve a group.

    False too where the weights give NaN or inf: the rollout will say so.

    Args:
        policy: its model as it was built or loaded.
        name: what errors begin with.

    Raises:
        ConfigError: neither a cache nor whole sequences give what one sequence alone gives, or the
            model does not run.
    """
    context = policy.context
    if context is not None and context < max(_PROMPTS) + _RESPONSE:
        return False
    with _running(policy, name):
        probe = _Probe(policy)
    if not bool(probe.truth.isfinite().all()):
        return False
    of_cache = probe.error(probe.read_with_cache)
    if of_cache is None:
        return False
    of_whole = probe.error(probe.read_whole)
    if of_whole is None:
        return True
    raise ConfigError(
        f"{name}: {type(policy.model).__name__} can be read neither with a cache ({of_cache}) nor "
        f"as whole sequences ({of_whole}), so it cannot be trained; take another model"
    )


class _Probe:
    """Made-up prompts and responses, and the hidden states that they have alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        draws = torch.Generator().manual_seed(0)
        width, rows = max(_PROMPTS), len(_PROMPTS) * _GROUP
        words = policy.model.get_input_embeddings().num_embeddings
        ids = torch.randint(words, (len(_PROMPTS), width), generator=draws)
        mask = torch.arange(width) >= width - torch.tensor(_PROMPTS)[:, None]
        self.prompt_ids = ids.masked_fill(~mask, policy.pad_id).to(policy.device)
        self.prompt_mask = mask.to(policy.device)
        drawn = torch.randint(words, (rows, _RESPONSE), generator=draws)
        self.responses = drawn.to(policy.device)
        self.truth, self.routes = self._alone()

    def _alone(self) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T + 1, H] from the prompts' last tokens on, and [B, Sp + T, L, K]."""
        hidden, routes = [], []
        for prompt, length in enumerate(_PROMPTS):
            rows = slice(prompt * _GROUP, (prompt + 1) * _GROUP)
            ids = self.prompt_ids[prompt, -length:].expand(_GROUP, -1)
            ids = torch.cat([ids, self.responses[rows]], dim=1)
            with record_routing(self.policy.model) as seen:
                read = self.policy.read_whole(ids, torch.ones_like(ids, dtype=torch.bool))
            hidden.append(read[:, length - 1 :])
            missing = max(_PROMPTS) - length
            routes.append(
                torch.nn.functional.pad(seen.routed_experts, (0, 0, 0, 0, missing, 0), value=-1)
            )
        return torch.cat(hidden).float(), torch.cat(routes)

    def error(self, read: Callable[[], Tensor]) -> str | None:
        """What is wrong with a way of reading, in a few words; None: nothing."""
        try:
            found = read().float()
        except _ERRORS as error:
            return f"{type(error).__name__}: {error!s:.120}"
        missed = float((found - self.truth).norm() / self.truth.norm())
        wrong = missed > _tolerance(self.policy)
        return f"hidden states differ by {missed:.1e} of their norm" if wrong else None

    def read_with_cache(self) -> Tensor:
        """As rollouts sample, a token at a time, and as training reads, the response at once."""
        policy, width = self.policy, self.prompt_ids.shape[1]
        read = []
        for steps in ([1] * _RESPONSE, [_RESPONSE]):
            with replay_routing(policy.model, self.routes[::_GROUP, :width]):
                hidden, cache = policy.read_prompts(self.prompt_ids, self.prompt_mask)
            cache.batch_repeat_interleave(_GROUP)
            parts = [hidden[:, -1:].repeat_interleave(_GROUP, dim=0)]
            with replay_routing(policy.model, self.routes[:, width:]):
                for ids in self.responses.split(steps, dim=1):
                    parts.append(policy.continue_responses(ids, cache, self.prompt_mask, _GROUP))
            read.append(torch.cat(parts, dim=1))
        by_token, at_once = read  # at each place, the worse of the two
        far, near = ((found.float() - self.truth).abs() for found in read)
        return torch.where(far > near, by_token, at_once)

    def read_whole(self) -> Tensor:
        """Padded as training reads them, and the prompts alone as a rollout begins."""
        policy, width = self.policy, self.prompt_ids.shape[1]
        with replay_routing(policy.model, self.routes[::_GROUP, :width]):
            first = policy.read_whole(self.prompt_ids, self.prompt_mask)[:, -1:]
        ids = torch.cat([self.prompt_ids.repeat_interleave(_GROUP, dim=0), self.responses], dim=1)
        mask = self.prompt_mask.repeat_interleave(_GROUP, dim=0)
        mask = torch.nn.functional.pad(mask, (0, _RESPONSE), value=True)
        with replay_routing(policy.model, self.routes):
            hidden = policy.read_whole(ids, mask)[:, width - 1 :]
        # The prompts' last tokens as a rollout reads them: before there is a response to look at.
        return torch.cat([first.repeat_interleave(_GROUP, dim=0), hidden[:, 1:]], dim=1)
