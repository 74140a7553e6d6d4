"""The value head: one number read off the policy's hidden state, the reward that it expects."""

import torch
from torch import Tensor, nn

from moe_rl.config import RunConfig
from moe_rl.policy.policy import Policy


class ValueHead(nn.Module):
    """V = w . h + b, for each response token of the hidden state h that predicts it.

    It begins as 0, as in the code of arXiv 1909.08593: the first rollout's advantages are then
    those without a value. float32, whatever the policy's dtype.

    Args:
        config: says whether the gradient goes on into the hidden states.
        policy: whose hidden states it reads.
    """

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        super().__init__()
        self.trains_policy = config.value_trains_policy
        hidden_size = policy.model.get_output_embeddings().weight.shape[1]
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=policy.device))
        self.bias = nn.Parameter(torch.zeros(1, device=policy.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values float32 [B, T] of hidden states [B, T, H]."""
        hidden = hidden if self.trains_policy else hidden.detach()
        return hidden.float() @ self.weight + self.bias
