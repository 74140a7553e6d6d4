"""vLLM as the rollout engine: a copy of the weights, refreshed before each rollout, checked after.

Weights are handed over as vLLM documents it for reinforcement learning: safetensors in the folder
the engine was built from, `reload_weights` on its workers, and an emptied prefix cache, whose keys
and values belong to the old weights.

Which tokens follow a seed depends on vLLM's version and kernels. That its log-probs and its routes
are those of the weights it was handed is checked at every rollout, see `VllmEngine`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from moe_rl.batch import RolloutBatch
from moe_rl.config import ConfigError
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy
from moe_rl.rollout.request import Request
from moe_rl.rollout.vllm_outputs import read_outputs
from moe_rl.runtime.extras import import_extra
from moe_rl.runtime.seeding import request_seed

OPTIONS: dict[str, Any] = {
    "enable_return_routed_experts": True,
    # Log-probs of the distribution that is sampled from: the default is that before temperature.
    "logprobs_mode": "processed_logprobs",
    # Only our own stop tokens and sampling defaults, whatever the checkpoint's folder says.
    "generation_config": "vllm",
    # Ids go in and come out.
    "skip_tokenizer_init": True,
    # A progress bar for each reload would cut through the run's own lines.
    "use_tqdm_on_load": False,
    # Built with random weights near zero, it gets the policy's by its first reload: a weight that a
    # reload leaves behind shows at the first rollout, however slowly training moves the others.
    "load_format": "dummy",
    # The longest context that the memory for keys and values holds, if not the model's.
    "max_model_len": -1,
}
GPU_OPTIONS: dict[str, Any] = {
    # vLLM's default of 0.9 would leave no memory for the trainer, which lives on the same GPU.
    "gpu_memory_utilization": 0.3,
}
CPU_OPTIONS: dict[str, Any] = {
    # Under torch.compile, the default, every route that 0.30 returns is 0.
    "enforce_eager": True,
    # A prompt that is read in chunks ends a seeded request: "CPU Generator does not use offset".
    "enable_chunked_prefill": False,
    "worker_extension_cls": "moe_rl.rollout.vllm_worker.RepackExperts",
}
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
CPU_ENVIRONMENT = {
    # Without it a share of all memory becomes the key-value cache: 5.6 GiB of 24. In GiB.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # In this process: its worker would bind itself to cores that the trainer uses.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# Heads and the latent vectors of DeepSeek's attention that vLLM's CPU kernels are compiled for
# (0.30: v1/attention/backends/cpu_attn.py and mla/).
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_CPU_LATENT = 576

MISMATCH_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest mean |log-prob of vLLM - log-prob of the trainer| of equal weights and routes, in nats a
token, by the coarser arithmetic of the two. Measured: docs/engines.md."""


def import_vllm() -> Any:
    """The package, of a version that returns routes on this device.

    Raises:
        ConfigError: it is not installed, or of another version.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    vllm = import_extra("vllm", extra="vllm", option="engine='vllm'")
    check_version(vllm.__version__, on_cpu=runs_on_cpu())
    return vllm


def runs_on_cpu() -> bool:
    """Whether the vLLM that is installed was built for a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def keeps_first_experts(model: Any) -> bool:
    """Whether a reload of weights leaves a model's experts as they were built."""
    return runs_on_cpu() and model.config.model_type == "gpt_oss"


def check_version(version: str, *, on_cpu: bool) -> None:
    """Refuse a vLLM that cannot return routes.

    On a CPU 0.27 to 0.29 return none; 0.31 and 0.32 refuse to, because their model runner asks for
    a Triton that runs on a CPU.

    Raises:
        ConfigError: another version than 0.30 on a CPU, an older one on a GPU.
    """
    major, minor = map(int, version.split(".")[:2])
    found = (major, minor)
    if on_cpu and found != (0, 30):
        raise ConfigError(
            f"engine='vllm': vLLM {version} returns no routes on a CPU, 0.30 does; "
            "make vllm installs it"
        )
    if found < (0, 30):
        raise ConfigError(f"engine='vllm': vLLM {version} is older than 0.30; install a newer one")


def check_model(model: Any, *, trained: bool = True, bf16: bool = False) -> None:
    """Refuse a model for which vLLM's CPU backend has no kernels, or whose experts it keeps.

    Args:
        trained: whether the weights will change.
        bf16: whether vLLM is to compute in bfloat16.

    Raises:
        ConfigError: names the model's setting; or see `import_vllm`.
    """
    import_vllm()  # which says what it logs, before anything else of it is imported
    if not runs_on_cpu():
        return
    config = model.config.get_text_config()
    where = f"engine='vllm' on a CPU with a model of type {config.model_type}"
    if config.model_type == "gpt_oss":
        if trained:
            raise ConfigError(
                f"{where}: vLLM 0.30 keeps its first experts when weights are reloaded; use "
                "engine='cached'"
            )
        if not bf16:
            raise ConfigError(
                f"{where}: its attention sinks are in bfloat16 alone; take the engine's precision "
                "bf16"
            )
        if "factor" not in config.rope_parameters:
            raise ConfigError(
                f"{where}: rope_parameters without a factor, and vLLM reads them as YaRN's; use "
                "engine='cached'"
            )
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None and latent + config.qk_rope_head_dim != _CPU_LATENT:
        raise ConfigError(
            f"{where}: its attention kernels take kv_lora_rank + qk_rope_head_dim = {_CPU_LATENT}, "
            f"not {latent} + {config.qk_rope_head_dim}; use engine='cached'"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if latent is None and width not in _CPU_HEADS:
        raise ConfigError(
            f"{where}: num_attention_heads={heads} makes heads {width} wide, and its kernels take "
            f"{', '.join(map(str, _CPU_HEADS))}; take another number of heads"
        )
    if config.hidden_size % 32:
        raise ConfigError(
            f"{where}: hidden_size={config.hidden_size} is no multiple of 32, which its expert "
            "kernels need; change it"
        )


class VllmEngine:
    """A `vllm.LLM`, built at the first rollout, that gets a policy's weights before each.

    After each rollout the trainer reads the responses to the first prompt under the routes that
    vLLM recorded for them. It must find the log-probs that vLLM returned, up to the rounding of
    their arithmetic. Weights that a reload does not reach, routes of another pass and another
    temperature show at the first rollout; a reload that fails later, once the weights have moved
    by more than that rounding.

    Args:
        policy: the trainer's.
        dtype: what vLLM computes with; None: what the policy does.

    Raises:
        ConfigError: the package is not installed, or of a version that returns no routes.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype | None = None) -> None:
        self.policy = policy
        self._dtype = dtype or policy.model.dtype
        self._vllm: Any = import_vllm()
        self._folder = tempfile.TemporaryDirectory(prefix="moe-rl-vllm-")
        self._llm: Any = None

    def sample(self, request: Request) -> RolloutBatch:
        """See `Engine`; vLLM returns no router logits."""
        assert request.noise is None and not request.gate_weights  # refused by RunConfig
        self._send_weights()
        ids, mask = self.policy.encode_prompts(request.prompts)
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        outputs = self._llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            [self._sampling(request, number) for number in request.numbers],
            use_tqdm=False,
        )
        batch = read_outputs(
            outputs,
            policy=self.policy,
            prompt_ids=ids,
            prompt_mask=mask,
            group_size=request.group_size,
            max_tokens=request.max_tokens,
        )
        self._check_mismatch(batch.select_prompts(slice(0, 1)), request.step)
        return batch

    def _sampling(self, request: Request, number: int) -> Any:
        return self._vllm.SamplingParams(
            n=request.group_size,
            temperature=self.policy.temperature,
            max_tokens=request.max_tokens,
            seed=request_seed(request.seed, request.purpose, step=request.step, prompt=number),
            logprobs=0,  # of the sampled token alone
            # Without a tokenizer vLLM knows no end of sequence.
            stop_token_ids=[*self.policy.end_ids],
            detokenize=False,
        )

    def _send_weights(self) -> None:
        """Make vLLM sample with the policy's weights as they are now."""
        root = Path(self._folder.name)
        fresh, served = root / "fresh", root / "served"
        served.mkdir(exist_ok=True)
        self.policy.model.save_pretrained(fresh)
        self.policy.tokenizer.save_pretrained(fresh)
        # By rename: vLLM may have mapped the old files into its memory.
        for file in fresh.iterdir():
            os.replace(file, served / file.name)
        if self._llm is None:
            self._llm = self._build(served)
            if keeps_first_experts(self.policy.model):
                return
            files = {"load_config": {"load_format": "auto"}}
            self._llm.collective_rpc("update_config", args=(files,))
        self._llm.collective_rpc(self._reload)
        if self._llm.reset_prefix_cache() is False:
            raise ValueError(
                "engine='vllm': it kept the prefix cache of the old weights because other requests "
                "are running; give the run an engine of its own"
            )

    def _build(self, served: Path) -> Any:
        on_cpu = runs_on_cpu()
        if on_cpu:
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        self._reload = "reload_and_repack" if on_cpu else "reload_weights"
        options = OPTIONS | (CPU_OPTIONS if on_cpu else GPU_OPTIONS)
        if keeps_first_experts(self.policy.model):
            options["load_format"] = "auto"
        dtype = str(self._dtype).removeprefix("torch.")
        set_num_threads = torch.set_num_threads
        try:
            return self._vllm.LLM(model=str(served), dtype=dtype, **options)
        finally:  # its CPU worker puts a function that does nothing there, in our process too
            torch.set_num_threads = set_num_threads

    def _check_mismatch(self, batch: RolloutBatch, step: int) -> None:
        with torch.no_grad():
            ours = response_pass(self.policy, batch, ForwardOptions(replay=batch.routed_experts))
        mask = batch.response_mask
        found = (ours.logprobs - batch.rollout_logprobs)[mask].abs().mean().item()
        coarser = max(
            self._dtype, self.policy.model.dtype, key=lambda dtype: torch.finfo(dtype).eps
        )
        bound, arithmetic = MISMATCH_BOUNDS[coarser], str(coarser).removeprefix("torch.")
        if not found <= bound:
            raise ValueError(
                f"engine='vllm' at rollout step {step}: its log-probs are {found:.2g} from the "
                f"trainer's under its routes, mean of {int(mask.sum())} tokens, where {arithmetic} "
                f"explains {bound}: it samples with other weights, or its routes are not those of "
                "its pass; use engine='cached' with this model"
            )
