"""A GRPOTrainer on a tiny MoE model and a CPU: what the tests of the TRL integration train.

Routers are spread, and the learning rate is so large that they move at every update.
"""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns about every rollout_func

from trl import GRPOConfig

from moe_rl.integrations.trl import RoutingReplayGRPOTrainer
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.routing import record_routing, replay_routing

ALPHABET = "0123456789="
PROMPTS = ["1=", "98765=", "31=", "2345="]
RESPONSE = 6
SIZES = {
    "vocab_size": len(ALPHABET) + 2,
    "hidden_size": 32,
    "head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def tiny_model(family: str = "qwen3_moe", **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim > 1:
            value.normal_(0, 0.02 if "lm_head" in name else 0.3)
    return model


def like(model: torch.nn.Module) -> PreTrainedModel:
    """A fresh model of the weights of another, without TRL's fused head."""
    copy = tiny_model().eval()
    copy.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return copy


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "steps_per_generation": 1,
        "num_iterations": 2,
        "max_completion_length": RESPONSE,
        "max_steps": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "loss_type": "grpo",
        "optim": "adamw_torch",
        "router_aux_loss_coef": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return GRPOConfig(**{**settings, **changes})


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Different within a group; fails if routes were passed on."""
    assert not {name for name in columns if "routed" in name}
    return [float(sum(map(ord, text)) % 7) for text in completions]


def build(folder: Path, kind: Any = RoutingReplayGRPOTrainer, **options: Any) -> Any:
    """A trainer; options are its own, and under `args` those of GRPOConfig."""
    settings: dict[str, Any] = {
        "model": options.pop("model", None) or tiny_model(),
        "reward_funcs": reward,
        "args": arguments(folder, **options.pop("args", {})),
        "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 8]),
        "processing_class": tokenizer_of(ALPHABET),
    }
    return kind(**settings, **options)


def logged(trainer: Any) -> list[dict[str, float]]:
    """One dict an update."""
    return [line for line in trainer.state.log_history if "loss" in line]


class Spy(RoutingReplayGRPOTrainer):
    """Keeps, of every forward in a loss, what went in and came out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self.logprobs: Tensor | None = None
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self.logprobs = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        with record_routing(model) as used:  # of the split too, which comes before the loss
            loss = super()._compute_loss(model, inputs)
        self.seen.append(
            {
                "inputs": inputs,
                "used": used.routed_experts[-len(inputs["prompt_ids"]) :],
                "logprobs": self.logprobs,
                "loss": loss.item(),
                "weights": weights,
            }
        )
        return loss


def whole(inputs: dict[str, Any], row: int) -> tuple[Tensor, Tensor, int]:
    """One sequence without padding [1, S], where it lies in the batch, and its prompt's length."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[row]
    places = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[row].bool()
    return tokens[places][None], places, int(inputs["prompt_mask"][row].sum())


@torch.no_grad()
def alone(model: PreTrainedModel, tokens: Tensor, prompt: int, routes: Tensor | None) -> Any:
    """Log-probs of the response and routes of one sequence in a forward of its own."""
    with record_routing(model) as used:
        if routes is None:
            logits = model(tokens, use_cache=False).logits
        else:
            with replay_routing(model, routes):
                logits = model(tokens, use_cache=False).logits
    predicted = logits[:, prompt - 1 : -1].log_softmax(-1)
    return predicted.gather(-1, tokens[:, prompt:, None])[0, :, 0], used.routed_experts


def own_engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout_func whose engine is the trainer's model: it samples, and records its routes."""
    draws = torch.Generator().manual_seed(1000 * trainer.accelerator.process_index)
    out: dict[str, Any] = {
        name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "routed_experts")
    }
    for prompt in trainer.processing_class(text=prompts)["input_ids"]:
        tokens = torch.tensor([prompt])
        for _ in range(RESPONSE):
            with torch.no_grad():
                last = trainer.model(tokens, use_cache=False).logits[:, -1]
            token = torch.multinomial(last.softmax(-1), 1, generator=draws)
            tokens = torch.cat([tokens, token], 1)
            if int(token) == 1:
                break
        logprobs, routes = alone(trainer.model, tokens, len(prompt), None)
        out["prompt_ids"].append(prompt)
        out["completion_ids"].append(tokens[0, len(prompt) :].tolist())
        out["logprobs"].append(logprobs.tolist())
        out["routed_experts"].append(routes[0, :-1])
    return out
