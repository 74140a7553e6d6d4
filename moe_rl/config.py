"""Every setting of a run: frozen pydantic dataclasses, checked when made.

Importable without torch. Field docstrings are the `--help` text of the command line, so each gives
meaning, unit and range. Numbers taken from a paper name it.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import Field

from moe_rl.runtime.strict import ConfigError as ConfigError
from moe_rl.runtime.strict import Count, PositiveFloat, Settings, Sha256, from_plain, strict
from moe_rl.tasks.settings import TaskConfig as TaskConfig

AlgorithmName = Literal[
    "grpo",
    "dual_clip",
    "dr_grpo",
    "dapo",
    "ppo",
    "cispo",
    "tis",
    "mis",
    "geo_rs",
    "icepop",
    "dppo_tv",
    "gmpo",
    "sapo",
    "rspo",
    "gspo",
    "gspo_token",
    "policy_gradient",
    "positive_only",
]
Aggregation = Literal["sequence_mean", "token_mean", "fixed_length"]
RoutingReplay = Literal["disabled", "R2", "R3", "TRR"]
RouterNoisePasses = Literal["all", "rollout", "old", "update"]
Family = Literal["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"]
EngineName = Literal["cached", "vllm"]
RolloutPrecision = Literal["float32", "bf16", "fp8", "int8", "int4"]
AuditPrecision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
AUDIT_PRECISIONS: tuple[AuditPrecision, ...] = get_args(AuditPrecision)
StudyName = Literal[
    "remedies",
    "tolerance",
    "denominator",
    "placement",
    "precision",
    "engine",
    "length",
    "depth",
    "irreversibility",
    "compute",
    "families",
    "cold_starts",
    "staleness",
    "disagreement",
]

_PARTS = ("model", "task", "cold_start")  # nested configs of a RunConfig
SCHEMA = 1
"""Version of the format of run folders and study folders."""

# Enough to be right as often as the teacher; for a dataset a guess.
_SFT_STEPS = {"running_sum": 400, "countdown": 600, "dataset": 400}

CountOrZero = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Both torch's generators and our counter-based one take 63 bits.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# A label becomes the name of a folder, so it may neither hold a slash nor begin with a dot.
Label = Annotated[str, Field(pattern=r"^[\w+-][\w.+-]*$")]
# FILE.py:FUNCTION, in a run and as an arm of a study.
OWN_LOSS = re.compile(r"[^:]+\.py:[^\W\d]\w*")


@strict
class ModelConfig(Settings):
    """The policy: a small MoE built from these sizes, or a Hugging Face checkpoint."""

    checkpoint: str | None = None
    """Folder or hub id (OWNER/NAME, OWNER/NAME@REVISION) of a Hugging Face MoE causal LM with its
    tokenizer; the sizes below are then unused."""
    family: Family = "qwen3_moe"
    """Transformers family whose routing, attention and experts a built model has."""
    num_layers: Count = 4
    """Decoder layers, each with a router (>= 1)."""
    hidden_size: Count = 96
    """Width of the residual stream; a multiple of 2 * num_attention_heads."""
    num_attention_heads: Count = 3
    """Attention heads (>= 1), with one key-value head each."""
    expert_size: Count = 64
    """Intermediate width of one expert (>= 1)."""
    num_experts: Annotated[int, Field(ge=1, le=2**15 - 1)] = 16
    """Experts per layer E, 1 to 32767 (ids are int16); dense if equal to experts_per_token."""
    experts_per_token: Count = 2
    """Experts chosen per token K, 1 <= K <= num_experts."""
    experts_implementation: Annotated[str, tyro.conf.arg(aliases=["--experts"])] = "auto"
    """Experts backend: auto, or a name registered in transformers' ExpertsInterface."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type; bfloat16 weights are trained through float32 masters."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""

    @property
    def is_dense(self) -> bool:
        """Whether a built model has all experts always on."""
        return self.num_experts == self.experts_per_token

    def conflicts(self) -> Iterator[str]:
        if self.experts_per_token > self.num_experts:
            yield (
                f"experts_per_token={self.experts_per_token} with num_experts={self.num_experts}: "
                "a token cannot choose more experts than there are; choose fewer"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            yield (
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}: rotary embeddings need a multiple of "
                f"{2 * self.num_attention_heads}; change one of them"
            )


@strict
class ColdStartConfig(Settings):
    """Supervised fine-tuning on noisy demonstrations, shared by all arms and seeds of a study."""

    sft_steps: CountOrZero | None = None
    """Supervised steps (0: none). Default: 400, countdown 600; 0 for a loaded checkpoint."""
    sft_batch_size: Count = 128
    """Demonstrations per supervised step (>= 1)."""
    sft_learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of the supervised steps (> 0), decayed linearly to a twentieth."""
    slip: Probability = 0.05
    """Probability that a step of a demonstration is wrong (later steps build on it), 0 to 1."""
    load_balance_coef: NonNegativeFloat = 0.01
    """Weight of the Switch load-balancing loss, in the cold start only (>= 0)."""
    sft_seed: Seed = 0
    """Random seed of initial weights and demonstrations; independent of the run's seed."""


@strict
class RunConfig(Settings):
    """One training run. The same config and seed give bitwise the same metrics on one machine."""

    arm: Label | None = None
    """Name of the method in reports. Default: derived from the settings, as in grpo+replay."""
    setting: Label = "default"
    """Name of the study setting that the run belongs to; a label only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)

    algorithm: AlgorithmName = "grpo"
    """The loss, by name; `moe-rl arms` explains each."""
    loss: str | None = None
    """Your own loss, FILE.py:FUNCTION, which takes the place of the algorithm."""
    loss_sha256: Sha256 | None = None
    """SHA-256 that the file of your own loss must have. Default: the one it has now."""
    clip_low: PositiveFloat | None = None
    """Lower clip range (> 0). Default: the algorithm's, 0.2 for grpo, 3e-4 for gspo."""
    clip_high: PositiveFloat | None = None
    """Upper clip range (> 0). Default: the algorithm's, 0.27 for grpo, 4e-4 for gspo."""
    loss_options: dict[str, float] = field(default_factory=dict)
    """Other options of the algorithm, as in `--loss-options bound 4`. Default: the algorithm's."""
    aggregation: Aggregation | None = None
    """Mean over tokens. Default: the algorithm's, mostly sequence_mean. token_mean: over all tokens
    of an update. fixed_length: over the token budget of all responses."""
    gae_lambda: Probability = 1.0
    """For ppo: lambda of generalised advantage estimation, 0 to 1. 1: no bootstrapping, as in verl;
    0.95, as in TRL, lets the reward fade towards the beginning of a response."""
    value_rate: PositiveFloat = 10.0
    """For ppo: learning rate of the value head over that of the policy (> 0); verl has 10."""
    value_trains_policy: bool = True
    """For ppo: pass the value loss's gradient on into the policy's layers below the value head."""
    routing_replay: RoutingReplay = "disabled"
    """Expert choices that updates replay. R2: the old policy's; R3: the rollout engine's; TRR: the
    engine's with its gate weights, under which routers are not trained."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Source of old log-probs: a trainer pass before the updates, or the rollout engine."""
    old_passes: Count = 1
    """Trainer passes whose mean probability is the old one (>= 1); they differ under noise."""
    engine: EngineName = "cached"
    """Rollout engine: the policy with a key-value cache, or vLLM (docs/engines.md)."""
    rollout_precision: RolloutPrecision = "float32"
    """Round the engine's weights to bf16, fp8, int8 or int4; float32: the policy's own numbers.
    vllm with bf16 computes in bfloat16 too."""
    router_noise: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Standard deviation of Gaussian noise added to router logits (logit units), 0 to 1000."""
    hidden_noise: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Standard deviation of Gaussian noise added to the hidden states that predict response tokens,
    0 to 1000: passes then disagree without any routing, in a dense model too."""
    router_noise_passes: RouterNoisePasses = "all"
    """Passes that draw both noises: rollout (sampling), old (old log-probs), update, or all."""
    freeze_router: bool = False
    """Do not train router weights."""

    steps: Count = 60
    """Rollout steps (>= 1)."""
    prompts_per_rollout: Count = 32
    """Prompts P per rollout (>= 1)."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Responses G sampled per prompt (>= 2)."""
    updates_per_rollout: Count = 8
    """Optimiser updates m per rollout, each on P/m whole groups; more is more off-policy."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Temperature of sampling and of all log-probs, 1e-3 to 1e3."""

    learning_rate: PositiveFloat = 5e-4
    """Base learning rate of AdamW (> 0); warm-up and decay multiply it."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """constant, or linear: times 1 - step / steps from the first step on, beside the warm-up."""
    warmup_steps: CountOrZero = 5
    """Rollout steps of linear warm-up (>= 0)."""
    adam_beta1: Beta = 0.9
    """AdamW beta1, in [0, 1)."""
    adam_beta2: Beta = 0.95
    """AdamW beta2, in [0, 1)."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW epsilon (> 0)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (>= 0)."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm is clipped to this (> 0) before each update."""

    seed: Seed = 0
    """Random seed of prompts, samples and noise, 0 to 2^63 - 1."""
    num_threads: Count = 1
    """CPU threads of torch and numpy (>= 1)."""
    prompts_per_forward: Count | None = None
    """Gradient accumulation: groups per forward-backward pass. Default: the whole minibatch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; a group's prompt is then read per response."""
    allow_any_clip_scale: bool = False
    """Accept a clip range of the other kind of ratio, such as 0.2 for gspo."""
    instruments: bool = True
    """Routing and ratio metrics; recorded unless turned off."""
    attribution_every: CountOrZero = 1
    """Split the log-ratio variance into routing and weights every n rollouts; 0: never."""
    evaluate_every: CountOrZero = 0
    """Measure held-out pass@1 and pass@k every n rollout steps; 0: never."""
    evaluation_prompts: Count = 64
    """Held-out prompts of an evaluation (>= 1); all of a held-out file that has fewer."""
    evaluation_samples: Count = 32
    """Responses sampled to each held-out prompt (>= 1); pass@1 is their mean."""
    evaluation_k: Count = 8
    """k of pass@k, at most evaluation_samples: is one of k samples right?"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a NaN or inf loss or gradient: stop with a crash bundle, or skip the update."""
    checkpoint_every: CountOrZero = 0
    """Checkpoint every n rollout steps, to resume from with --resume; 0: never."""
    record_every: CountOrZero = 0
    """Write the batch of every n-th rollout into the run folder, for `moe-rl inspect`; 0: never."""
    save_every: CountOrZero = 0
    """Save the policy in Hugging Face format every n rollout steps and at the end; 0: never."""

    def conflicts(self) -> Iterator[str]:
        if self.loss is not None and not OWN_LOSS.fullmatch(self.loss):
            yield f"loss={self.loss!r}: no FILE.py:FUNCTION; give one, as in my_loss.py:my_loss"
        if self.loss is not None and self.algorithm != "grpo":
            yield (
                f"loss={self.loss!r} with algorithm={self.algorithm}: your own loss takes the "
                "algorithm's place; leave one of them out"
            )
        if self.loss is None and self.loss_sha256 is not None:
            yield f"loss_sha256={self.loss_sha256}: no file to check; give one as loss"
        prompts_per_update, left_over = divmod(self.prompts_per_rollout, self.updates_per_rollout)
        if left_over:
            yield (
                f"updates_per_rollout={self.updates_per_rollout} with prompts_per_rollout="
                f"{self.prompts_per_rollout}: each update takes whole groups; let the first divide "
                "the second"
            )
        if self.prompts_per_forward and prompts_per_update % self.prompts_per_forward:
            yield (
                f"prompts_per_forward={self.prompts_per_forward}: does not divide the "
                f"{prompts_per_update} prompts of an update; use a divisor"
            )
        if self.evaluate_every and self.evaluation_k > self.evaluation_samples:
            yield (
                f"evaluation_k={self.evaluation_k} with evaluation_samples="
                f"{self.evaluation_samples}: pass@k needs at least k samples; lower the first or "
                "raise the second"
            )
        if self.task.evaluation_dataset is not None and not self.evaluate_every:
            yield (
                f"evaluation_dataset={self.task.evaluation_dataset!r} with evaluate_every=0: it "
                "would never be read; set evaluate_every"
            )
        if self.old_passes > 1 and self.old_logprobs == "rollout":
            yield (
                f"old_passes={self.old_passes} with old_logprobs=rollout: no old log-probs are "
                "computed; use old_logprobs=trainer, or old_passes=1"
            )
        if self.router_noise_passes != "all" and not (self.router_noise or self.hidden_noise):
            yield (
                f"router_noise_passes={self.router_noise_passes} with router_noise=0 and "
                "hidden_noise=0: there is no noise to put there; set one of them"
            )
        if self.router_noise_passes == "old" and self.old_logprobs == "rollout":
            yield (
                "router_noise_passes=old with old_logprobs=rollout: there is no old pass; use "
                "old_logprobs=trainer, or another pass"
            )
        for name in ("router_noise", "hidden_noise"):
            if self.engine == "vllm" and getattr(self, name) > 0:
                yield (
                    f"engine=vllm with {name}={getattr(self, name)}: noise goes into our own "
                    f"model, not into vLLM's; use {name}=0, or engine=cached"
                )
        # vLLM raises a smaller temperature to this one (_MAX_TEMP in its sampling_params.py).
        if self.engine == "vllm" and self.temperature < 0.01:
            yield (
                f"engine=vllm with temperature={self.temperature}: vLLM samples at 0.01 below "
                "that; use a larger one"
            )
        if self.engine == "vllm" and self.routing_replay == "TRR":
            yield (
                "engine=vllm with routing_replay=TRR: vLLM returns the experts that it chose, not "
                "their gate weights; use routing_replay=R3, or engine=cached"
            )

    @property
    def sft_steps(self) -> int:
        """Supervised steps of the cold start, resolved."""
        if self.cold_start.sft_steps is not None:
            return self.cold_start.sft_steps
        return _SFT_STEPS[self.task.task] if self.model.checkpoint is None else 0

    def named(self) -> "RunConfig":
        """The same run with `arm` spelled out."""
        if self.arm is not None:
            return self
        if self.model.checkpoint is None and self.model.is_dense:
            arm = "dense"
        elif self.freeze_router:
            arm = "frozen-router"
        else:
            arm = self.algorithm if self.loss is None else self.loss.rpartition(":")[2]
            arm += {"disabled": "", "TRR": "+trr"}.get(self.routing_replay, "+replay")
        return dataclasses.replace(self, arm=arm)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range; names the field.
        """
        return from_plain(cls, values)

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with fields changed, nested ones too: replace(learning_rate=1e-4, num_experts=2).

        Nested field names are unique across the config, so no prefix is needed.
        """
        parts = {name: getattr(self, name) for name in _PARTS}
        # `task` is a nested config and also that config's first field, which a string means.
        given = {name for name in parts if not isinstance(changes.get(name, ""), str)}
        parts |= {name: changes.pop(name) for name in given}
        for name, part in parts.items():
            inner = {f.name for f in dataclasses.fields(part)} & changes.keys()
            parts[name] = dataclasses.replace(part, **{key: changes.pop(key) for key in inner})
        return dataclasses.replace(self, **parts, **changes)


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `RunConfig.to_dict` by name, those of its parts too: no name comes twice."""
    own = {name: value for name, value in config.items() if name not in _PARTS}
    return own | {name: value for part in _PARTS for name, value in config[part].items()}


def check_schema(found: Any, where: object) -> None:
    """Refuse what another version of the project wrote.

    Raises:
        ConfigError: begins with `where`, the file or folder.
    """
    if found != SCHEMA:
        raise ConfigError(
            f"{where}: schema {found!r:.40}, this version reads schema {SCHEMA}; use the version "
            "of moe-rl that wrote it"
        )


def load_config(path: str) -> RunConfig:
    """Read a config, or the config.json of a run folder.

    Raises:
        ConfigError: unreadable file, malformed JSON (with its line), unknown key or wrong type; the
            message begins with the path.
    """
    try:
        values = json.loads(Path(path).read_bytes())
        if isinstance(values, Mapping) and "config" in values and "schema" in values:
            check_schema(values["schema"], "config")
            values = values["config"]
        return RunConfig.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
