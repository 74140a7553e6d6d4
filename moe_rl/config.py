"""Run configuration: frozen dataclasses, validated on construction; presets are plain functions.

Importable without torch. Field docstrings are the `--help` text of the command line, so each gives
meaning, unit and range. Numbers taken from a paper name it.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_rl.runtime.json_text import parse_json, shown

Algorithm = Literal["grpo", "gspo", "gspo_token"]
RoutingReplay = Literal["disabled", "R2", "R3"]
Family = Literal["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"]
EngineName = Literal["cached", "vllm"]


SCHEMA = 1
"""Of the files that runs and studies write."""

# Seeds are words of a counter-based generator and arguments of torch's: both take 63 bits.
_SEEDS = 2**63
_MAX_NOISE = 1000.0
# vLLM raises a smaller one to it (_MAX_TEMP in its sampling_params.py).
_LEAST_VLLM_TEMPERATURE = 0.01
# Enough to be right about 30% of the time; for a dataset a guess.
_SFT_STEPS = {"running_sum": 400, "countdown": 600, "dataset": 400}
# Bytes of a config: ours have 3000, and some paths have no end (/dev/zero).
_LONGEST = 2**20
# Ids of experts are recorded as int16.
_MAX_EXPERTS = 2**15 - 1
# Thousands of layers would be built one by one until memory is full.
_MAX_LAYERS = 1024


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, its value and the way out."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: a small MoE built from these sizes, or a local Hugging Face checkpoint."""

    checkpoint: str | None = None
    """Folder of a Hugging Face MoE causal LM with its tokenizer. What follows is then ignored."""
    family: Family = "qwen3_moe"
    """Whose routing, attention and experts a built model has."""
    num_layers: int = 4
    """Decoder layers, each with a router (>= 1)."""
    hidden_size: int = 96
    """Width of the residual stream; a multiple of 2 * num_attention_heads."""
    num_attention_heads: int = 4
    """Attention heads; key-value heads are as many."""
    expert_size: int = 64
    """Intermediate width of one expert."""
    num_experts: int = 16
    """Experts per layer E (>= 1). Equal to experts_per_token: every expert is always on."""
    experts_per_token: int = 2
    """Experts chosen per token K, 1 <= K <= num_experts."""
    experts_implementation: str = "auto"
    """Experts backend: auto, or a name registered in transformers' ExpertsInterface; --experts for
    short."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "expert_size"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value}: must be at least 1")
        _require(
            self.num_layers <= _MAX_LAYERS,
            f"num_layers={self.num_layers}: at most {_MAX_LAYERS}",
        )
        _require(
            1 <= self.num_experts <= _MAX_EXPERTS,
            f"num_experts={self.num_experts}: must be from 1 to {_MAX_EXPERTS}, as ids are "
            "recorded in 16 bits",
        )
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} with num_experts={self.num_experts}: "
            "top-k needs 1 <= experts_per_token <= num_experts",
        )
        _require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads}: "
            "rotary embeddings need hidden_size to be a multiple of 2 * num_attention_heads",
        )


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The verifiable-reward task. digits and numbers count for their own task only."""

    task: Literal["running_sum", "countdown", "dataset"] = "running_sum"
    """running_sum: n digits, answer their running sums modulo 10. countdown: reach a target.
    dataset: prompts and answers of a file."""
    digits: int = 16
    """running_sum: digits in a prompt, 1 to 64."""
    numbers: int = 3
    """countdown: numbers to combine, 2 to 4."""
    dataset: str | None = None
    """dataset: file of one {"prompt": text, "answer": text} a line."""
    dataset_sha256: str | None = None
    """dataset: what the file must hold, as 64 hexadecimal digits. Default: what it holds now."""
    response_tokens: int | None = None
    """dataset: tokens a response may have. Default: one more than the longest answer's letters."""

    def __post_init__(self) -> None:
        _require(1 <= self.digits <= 64, f"digits={self.digits}: must be from 1 to 64")
        _require(2 <= self.numbers <= 4, f"numbers={self.numbers}: must be from 2 to 4")
        _require(
            self.task != "dataset" or self.dataset is not None,
            "task=dataset: no file to read; give one as dataset",
        )
        for name in ("dataset", "dataset_sha256", "response_tokens"):
            value = getattr(self, name)
            _require(
                self.task == "dataset" or value is None,
                f"{name}={value!r:.80} with task={self.task}: belongs to task=dataset; choose that",
            )
        _require(
            self.dataset_sha256 is None
            or re.fullmatch("[0-9a-f]{64}", self.dataset_sha256) is not None,
            f"dataset_sha256={self.dataset_sha256!r:.80}: must be 64 hexadecimal digits",
        )
        _require(
            self.response_tokens is None or self.response_tokens >= 1,
            f"response_tokens={self.response_tokens}: must be at least 1",
        )

    def options(self) -> dict[str, Any]:
        """The named task's own options."""
        names = {
            "running_sum": ("digits",),
            "countdown": ("numbers",),
            "dataset": ("dataset", "dataset_sha256", "response_tokens"),
        }[self.task]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Supervised warm start on noisy demonstrations; all arms and seeds start from the same one."""

    sft_steps: int | None = None
    """Supervised steps; 0: none. Default: 400, countdown 600; none for a loaded checkpoint."""
    sft_batch_size: int = 128
    """Demonstrations per supervised step."""
    sft_learning_rate: float = 2e-3
    """Peak learning rate, decayed linearly to a twentieth."""
    slip: float = 0.08
    """Probability that a step of a demonstration slips (and goes on from the slip), 0 to 1."""
    load_balance_coef: float = 0.01
    """Weight of the Switch load-balancing loss during the cold start only."""
    sft_seed: int = 0
    """Seed of initial weights and demonstrations; independent of the run's seed."""

    def __post_init__(self) -> None:
        _require(
            self.sft_steps is None or self.sft_steps >= 0,
            f"sft_steps={self.sft_steps}: must be 0 or more",
        )
        _require(
            0 <= self.sft_seed < _SEEDS, f"sft_seed={self.sft_seed}: must be from 0 to 2^63 - 1"
        )
        _require(
            self.sft_batch_size >= 1, f"sft_batch_size={self.sft_batch_size}: must be at least 1"
        )
        _require(
            math.isfinite(self.sft_learning_rate) and self.sft_learning_rate > 0,
            f"sft_learning_rate={self.sft_learning_rate}: must be a positive number",
        )
        _require(0.0 <= self.slip <= 1.0, f"slip={self.slip}: a probability, from 0 to 1")
        _require(
            math.isfinite(self.load_balance_coef) and self.load_balance_coef >= 0,
            f"load_balance_coef={self.load_balance_coef}: must be 0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. The same config and seed give bitwise the same metrics on one machine."""

    arm: str | None = None
    """Name of the run's arm in reports. Default: what the settings say, as in grpo+replay."""
    setting: str = "default"
    """Name of the run's setting in a study; a label only."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)

    algorithm: Algorithm = "grpo"
    """grpo: token ratios. gspo: sequence ratios. gspo_token: sequence ratios, token gradients."""
    clip_low: float | None = None
    """Lower clip range; default from the GSPO paper, 5.1: 0.2 for grpo, 3e-4 for gspo."""
    clip_high: float | None = None
    """Upper clip range; default from the GSPO paper, 5.1: 0.27 for grpo, 4e-4 for gspo."""
    routing_replay: RoutingReplay = "disabled"
    """R2 replays the expert choices of the old policy, R3 those of the rollout engine."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Who computes the old log-probs: a trainer pass before the updates, or the rollout engine."""
    engine: EngineName = "cached"
    """Who samples: the policy itself with a key-value cache, or vLLM (the extra vllm)."""
    router_noise: float = 0.0
    """Standard deviation of Gaussian noise on router logits at the expert choice (logit units)."""
    freeze_router: bool = False
    """Keep router weights at their cold start."""

    steps: int = 60
    """Rollout steps."""
    prompts_per_rollout: int = 32
    """Prompts P per rollout."""
    group_size: int = 16
    """Responses G sampled per prompt (>= 2)."""
    updates_per_rollout: int = 8
    """Optimiser updates m per rollout, each on P/m whole groups: the off-policy knob."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""

    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """After warm-up: constant, or decayed linearly to 0 at the end of the run."""
    warmup_steps: int = 5
    """Rollout steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW beta1, in [0, 1)."""
    adam_beta2: float = 0.95
    """AdamW beta2, in [0, 1)."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this before each update."""

    seed: int = 0
    """Seed of prompts, samples and noise."""
    num_threads: int = 1
    """Torch threads of the run."""
    prompts_per_forward: int | None = None
    """Groups per forward-backward pass: gradient accumulation. Default: the whole minibatch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; prompts are then not shared within a group."""
    allow_any_clip_scale: bool = False
    """Accept a clip range of the other algorithm's scale."""
    instruments: bool = True
    """Record the routing and ratio metrics."""
    attribution_every: int = 1
    """Split the log-ratio variance on the last update of every n-th rollout; 0: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with a crash bundle, or skip the update."""
    checkpoint_every: int = 0
    """Checkpoint every n optimiser updates, to go on from with --resume; 0: never."""
    save_every: int = 0
    """Save the policy in Hugging Face format every n rollout steps and at the end; 0: never."""

    def __post_init__(self) -> None:
        for name in ("arm", "setting"):
            label = getattr(self, name)
            _require(
                label is None or re.fullmatch(r"[\w+-][\w.+-]*", label) is not None,
                f"{name}={label!r:.80}: names a folder; use a word of letters, digits and _ + - . "
                "without / or a leading dot",
            )
        minimum = {
            "steps": 1,
            "prompts_per_rollout": 1,
            "updates_per_rollout": 1,
            "warmup_steps": 0,
            "num_threads": 1,
            "attribution_every": 0,
            "checkpoint_every": 0,
            "save_every": 0,
        }
        for name, least in minimum.items():
            value = getattr(self, name)
            _require(value >= least, f"{name}={value}: must be at least {least}")
        _require(0 <= self.seed < _SEEDS, f"seed={self.seed}: must be from 0 to 2^63 - 1")
        _require(
            self.group_size >= 2,
            f"group_size={self.group_size}: group advantages compare responses to one prompt; "
            "use at least 2",
        )
        _require(
            self.prompts_per_rollout % self.updates_per_rollout == 0,
            f"updates_per_rollout={self.updates_per_rollout} with prompts_per_rollout="
            f"{self.prompts_per_rollout}: each update takes whole groups; use a divisor",
        )
        if self.prompts_per_forward is not None:
            prompts_per_update = self.prompts_per_rollout // self.updates_per_rollout
            _require(
                self.prompts_per_forward >= 1
                and prompts_per_update % self.prompts_per_forward == 0,
                f"prompts_per_forward={self.prompts_per_forward}: must divide the "
                f"{prompts_per_update} prompts of an update",
            )
        _require(
            1e-3 <= self.temperature <= 1e3,
            f"temperature={self.temperature}: must be from 1e-3 to 1e3",
        )
        _require(self.num_threads <= 1024, f"num_threads={self.num_threads}: at most 1024")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0, f"{name}={value}: must be a positive number"
            )
        _require(
            0 <= self.router_noise <= _MAX_NOISE,
            f"router_noise={self.router_noise}: logit units, from 0 to {_MAX_NOISE:g} (at 10 the "
            "choice is all but random)",
        )
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay={self.weight_decay}: must be 0 or more",
        )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{name}={value}: must be in [0, 1)")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            _require(
                value is None or (math.isfinite(value) and value > 0),
                f"{name}={value}: must be a positive number, or left out for the paper's value",
            )
        _require(
            not (self.routing_replay == "R2" and self.old_logprobs == "rollout"),
            "routing_replay=R2 with old_logprobs=rollout: R2 replays the choices of the trainer's "
            "own old pass, and no such pass is made; use R3, or old_logprobs=trainer",
        )
        if self.engine == "vllm":
            self._check_vllm()

    def _check_vllm(self) -> None:
        _require(
            self.router_noise == 0.0,
            f"engine=vllm with router_noise={self.router_noise}: the noise is put into our own "
            "routers, vLLM brings its own differences; use router_noise=0, or engine=cached",
        )
        _require(
            not (self.old_logprobs == "rollout" and self.instruments),
            "engine=vllm with old_logprobs=rollout: the instruments read router logits, which vLLM "
            "does not return; use old_logprobs=trainer, or instruments=False",
        )
        _require(
            self.temperature >= _LEAST_VLLM_TEMPERATURE,
            f"engine=vllm with temperature={self.temperature}: vLLM samples at "
            f"{_LEAST_VLLM_TEMPERATURE} below that; use a larger one",
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
        if self.model.checkpoint is None and self.model.num_experts == self.model.experts_per_token:
            arm = "dense"
        elif self.freeze_router:
            arm = "frozen-router"
        else:
            arm = self.algorithm + ("" if self.routing_replay == "disabled" else "+replay")
        return dataclasses.replace(self, arm=arm)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`; unknown keys and wrong types are errors that name the key."""
        return _from_dict(cls, values, prefix="")

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with fields changed, nested ones too: replace(learning_rate=1e-4, num_experts=2).

        Nested field names are unique across the config, so no prefix is needed.
        """
        own = {f.name for f in dataclasses.fields(self)}
        top = {k: v for k, v in changes.items() if k in own}
        rest = {k: v for k, v in changes.items() if k not in own}
        # task is both a nested config and the name of its first field; a string means the latter.
        if isinstance(top.get("task"), str):
            rest["task"] = top.pop("task")
        for name in ("model", "task", "cold_start"):
            part = top.get(name, getattr(self, name))
            mine = {f.name for f in dataclasses.fields(part)} & rest.keys()
            if mine:
                top[name] = dataclasses.replace(part, **{k: rest.pop(k) for k in mine})
        _require(not rest, f"unknown setting(s): {', '.join(sorted(rest))}")
        return dataclasses.replace(self, **top)


def _matches(value: Any, annotation: Any) -> bool:
    """Whether a JSON value fits a field's annotation (ints are accepted where floats are)."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _from_dict(cls: Any, values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".") or "config"
    _require(isinstance(values, Mapping), f"{where}: expected an object, got {values!r:.60}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{prefix}{shown(str(key))}: unknown setting{hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            arguments[key] = _from_dict(hint_type, value, prefix=f"{prefix}{key}.")
            continue
        if not _matches(value, hint_type):
            wanted = getattr(hint_type, "__name__", str(hint_type)).replace("typing.", "")
            raise ConfigError(f"{prefix}{key}={value!r:.80}: expected {wanted}")
        try:
            arguments[key] = float(value) if _is_float(hint_type, value) else value
        except OverflowError as error:
            raise ConfigError(f"{prefix}{key}: {len(str(value))} digits are too many") from error
    return cls(**arguments)


def _is_float(annotation: Any, value: Any) -> bool:
    """Whether a JSON number is to be a float: of a field that takes floats, absent or not."""
    return value is not None and (annotation is float or float in typing.get_args(annotation))


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
    values = _read_json(path)
    if isinstance(values, Mapping) and "config" in values and "schema" in values:
        check_schema(values["schema"], path)
        values = values["config"]
    try:
        return RunConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_json(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            raw = file.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            raise ConfigError(f"{path}: longer than any config ({_LONGEST} bytes)")
        return parse_json(raw.decode("utf-8"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: cannot be read (no UTF-8 text, from byte {error.start})"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def tiny() -> RunConfig:
    """A run of seconds, for trying things and for tests."""
    return RunConfig(
        setting="tiny",
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            expert_size=16,
            num_experts=8,
            experts_per_token=2,
        ),
        task=TaskConfig(digits=2),
        cold_start=ColdStartConfig(
            sft_steps=100, sft_batch_size=64, sft_learning_rate=1e-2, slip=0.2
        ),
        steps=4,
        prompts_per_rollout=8,
        group_size=8,
        updates_per_rollout=4,
        warmup_steps=1,
    )


def staleness() -> RunConfig:
    """Several updates on one rollout: routing drifts because the weights move.

    7e-4 is the largest learning rate tried at which the dense control ends within 20% of its peak
    (it dips on the way): experiments/README.md.
    """
    return RunConfig(
        setting="staleness",
        model=ModelConfig(num_experts=32),
        steps=40,
        updates_per_rollout=8,
        learning_rate=7e-4,
    )


def engine_noise() -> RunConfig:
    """The same, and routing differs between any two passes, as between two engines."""
    # `moe-rl calibrate --of tokens`: at 94% of tokens some router differs, as between the engines
    # of the R3 paper (arXiv 2510.11370).
    return staleness().replace(setting="engine-noise", router_noise=0.135)


PRESETS = {"tiny": tiny, "staleness": staleness, "engine-noise": engine_noise}


def preset(name: str) -> RunConfig:
    """The preset of that name.

    Raises:
        ConfigError: no such preset; names the nearest.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"preset={name!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]()
