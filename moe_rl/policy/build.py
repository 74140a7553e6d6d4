"""Build a policy: small with seeded weights, or loaded from a checkpoint with what that brings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.cpu import FastPath
from moe_rl.experts import choose_experts
from moe_rl.kernels.final_logits import final_logits
from moe_rl.policy.families import family_config
from moe_rl.policy.folder import as_loaded, find_model, import_transformers, load_model, loading
from moe_rl.policy.policy import Policy
from moe_rl.policy.probe import check_logits, must_read_whole
from moe_rl.policy.tokenizer import end_ids, tokenizer_of
from moe_rl.routing import find_routers


def build_policy(
    config: ModelConfig,
    alphabet: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    fuse: bool = True,
    sharded: bool = False,
) -> Policy:
    """A policy from `config`: built small with seeded weights, or loaded from `config.checkpoint`.

    Args:
        config: sizes, or the folder of a checkpoint.
        alphabet: tokens of the tokenizer of a built model.
        seed: of the initial weights of a built model.
        temperature: see `Policy`.
        dtype: in place of the config's, also one that is not trained in.
        fuse: on a CPU, swap in the fused layers; False leaves transformers' own.
        sharded: FSDP2 will shard the model: only what acts through its modules' forwards is used.

    Raises:
        ConfigError: a folder without a model that has routers and a tokenizer, logits that do not
            come from the head, or a device or experts backend that is unusable here; or a model
            that reads padded sequences wrongly (see `must_read_whole`).
    """
    import_transformers()  # no progress bars, neither now nor when the model is saved
    device = resolve_device(config.device)
    dtype = dtype or getattr(torch, config.dtype)
    if config.checkpoint is None:
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(alphabet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(family_config(config, len(tokenizer)))
        model = as_loaded(model, dtype)  # drawn in float32 whatever the dtype
    else:
        model, tokenizer = _load(config.checkpoint, dtype)
    model = model.to(device).eval()
    name = config.family if config.checkpoint is None else f"checkpoint={config.checkpoint!r}"
    with loading(name):
        final = final_logits(model)
    experts = _set_experts(model, device, config.experts_implementation)
    if fuse and not sharded:
        FastPath(model).install()
    policy = Policy(
        model=model, tokenizer=tokenizer, experts=experts, temperature=temperature, final=final
    )
    # The fused layers have a cache of their own, made for groups.
    if config.checkpoint is None or FastPath(model).is_installed():
        return policy
    check_logits(policy, name)
    return replace(policy, reads_whole=must_read_whole(policy, name))


def _set_experts(model: Any, device: torch.device, requested: str) -> str:
    """Give the model its experts backend; returns its name.

    Raises:
        ValueError: see `choose_experts`; or a backend by name for a model that takes none.
    """
    choice = choose_experts(device, requested)
    try:
        model.set_experts_implementation(choice.name)
    except ValueError as error:
        if requested != "auto":
            raise ConfigError(
                f"experts_implementation={requested!r}: {type(model).__name__} computes its "
                "experts by code of its own; use auto"
            ) from error
        return "own"
    return choice.name


def resolve_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU.

    Raises:
        ConfigError: a device that is not available here.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    usable = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in usable:
        raise ConfigError(f"device={name!r}: not available here; use auto, {', '.join(usable)}")
    return torch.device(name)


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    path, name = find_model(folder), f"checkpoint={folder!r}"
    model = load_model(path, name, tokenizer=True, dtype=dtype)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    try:
        find_routers(model)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ConfigError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, its model embeds {words}: they do "
            "not belong together; save the model's own tokenizer into the folder"
        )
    ends = end_ids(tokenizer, model.generation_config)
    if not ends:
        raise ConfigError(
            f"{name}: neither its tokenizer nor its generation_config has an end-of-sequence "
            "token, so that no response can end; set eos_token_id in generation_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    return model, tokenizer
