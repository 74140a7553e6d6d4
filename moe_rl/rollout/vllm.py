"""vLLM as the rollout engine: a copy of the weights, refreshed before each rollout.

Weights are handed over as vLLM documents it for reinforcement learning, the same in every release
since 0.11: safetensors in the folder the engine was built from, `reload_weights` on its workers,
and an emptied prefix cache, whose keys and values belong to the old weights.

Which tokens follow a seed depends on vLLM's version and kernels.
Only the contract of the fields is tested here, against a stand-in; no real vLLM has been run.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from moe_rl.batch import RolloutBatch
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
    # vLLM's default of 0.9 would leave no memory for the trainer, which lives on the same GPU.
    "gpu_memory_utilization": 0.3,
}


class VllmEngine:
    """A `vllm.LLM`, built at the first rollout, that gets a policy's weights before each.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._vllm: Any = import_extra("vllm", extra="vllm", option="engine='vllm'")
        self._folder = tempfile.TemporaryDirectory(prefix="moe-rl-vllm-")
        self._llm: Any = None

    def sample(self, request: Request) -> RolloutBatch:
        """See `Engine`."""
        # RunConfig refuses router_noise and old_logprobs=rollout with instruments for this engine.
        assert request.noise is None and not request.router_logits
        self._send_weights()
        ids, mask = self.policy.encode_prompts(request.prompts)
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        outputs = self._llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            [self._sampling(request, number) for number in request.numbers],
            use_tqdm=False,
        )
        return read_outputs(
            outputs,
            policy=self.policy,
            prompt_ids=ids,
            prompt_mask=mask,
            group_size=request.group_size,
            max_tokens=request.max_tokens,
        )

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
            dtype = str(self.policy.model.dtype).removeprefix("torch.")
            self._llm = self._vllm.LLM(model=str(served), dtype=dtype, **OPTIONS)
            return
        self._llm.collective_rpc("reload_weights")
        if self._llm.reset_prefix_cache() is False:
            raise ValueError(
                "engine='vllm': it kept the prefix cache of the old weights because other requests "
                "are running; give the run an engine of its own"
            )
