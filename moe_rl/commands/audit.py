"""`moe-rl audit MODEL`: how much routing and log-probs of a checkpoint move, before training it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moe_rl.commands.options import Command, TraceLayout
from moe_rl.config import (
    AUDIT_PRECISIONS,
    AuditPrecision,
    ConfigError,
    EngineName,
    ModelConfig,
    RolloutPrecision,
    TaskConfig,
)

if TYPE_CHECKING:
    from moe_rl.tasks import Prompt

BUILT_IN: tuple[Literal["running_sum", "countdown"], ...] = ("running_sum", "countdown")


@dataclass(frozen=True, kw_only=True)
class Audit(TraceLayout, Command):
    """Measure how far routing and log-probs of a checkpoint differ between numerics, experts
    backends, batch shapes and engines, and what replay removes. Nothing is trained."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or hub id of a Hugging Face MoE causal LM with its tokenizer."""
    prompts: str
    """JSONL, parquet or CSV file, hub dataset, reasoning-gym:NAME, running_sum or countdown."""
    prompt_column: str | None = None
    """Column of prompts. Default: prompt, question, problem or question_content."""
    dataset_config: str | None = None
    """Configuration of a hub dataset, such as main."""
    dataset_split: str | None = None
    """Split of a hub dataset. Default: train."""
    instruction: str | None = None
    """Line put behind each prompt."""
    chat: bool = False
    """Make each text a user's message and apply the tokenizer's chat template."""
    num_prompts: int = 32
    """Prompts to answer, the first ones of a file (>= 1)."""
    group_size: int = 4
    """Responses sampled for each prompt (>= 1)."""
    max_tokens: int = 64
    """Longest response (tokens, >= 1)."""
    temperature: float = 1.0
    """Temperature of sampling and of all log-probs (> 0)."""
    seed: int = 0
    """Random seed of the samples."""
    sequences_per_pass: int = 32
    """Sequences that a forward pass reads (>= 1); fewer need less memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the reference that all others are held against."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    experts: str = "auto"
    """Experts backend of the reference."""
    precisions: tuple[AuditPrecision, ...] = AUDIT_PRECISIONS
    """Numerics to compare: arithmetic in 32 or 16 bits, or weights rounded to 8 or 4."""
    engine: EngineName | None = None
    """An engine to compare, on responses that it samples itself."""
    engine_precision: RolloutPrecision = "float32"
    """Precision of --engine; bf16 is what vLLM usually runs in."""
    trace: Path | None = None
    """A recorded trace with token ids and routes of this model, to compare."""
    out: Path = Path("runs/audit")
    """Folder for audit.json, index.html and figures."""

    def run(self) -> int:
        """Measure, print the table and the verdicts, write the page."""
        for name in ("num_prompts", "group_size", "max_tokens", "sequences_per_pass"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give 1 or more")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature:g}: give a number above 0")
        prompts = self._read_prompts()
        trace = None if self.trace is None else (str(self.trace), self.read(self.trace))
        from moe_rl.analysis.report.audit_page import write_audit_page
        from moe_rl.audit import Sample, audit_model
        from moe_rl.audit.result import HEADING
        from moe_rl.run_folder.log import check_can_be_made, write_json

        check_can_be_made(self.out, "out")
        self._check_other_audit()
        said: list[str] = []

        def say(line: str) -> None:
            if not said:
                print(HEADING)
            said.append(line)
            print(line, flush=True)

        audit = audit_model(
            ModelConfig(
                checkpoint=self.model,
                dtype=self.dtype,
                device=self.device,
                experts_implementation=self.experts,
            ),
            prompts,
            Sample(
                group_size=self.group_size,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=self.seed,
                sequences_per_pass=self.sequences_per_pass,
            ),
            precisions=self.precisions,
            engine=self.engine,
            engine_precision=self.engine_precision,
            trace=trace,
            progress=say,
        )
        for name, reason in audit.missing:
            print(f"{name}: not read: {reason}")
        print()
        for sentence in audit.verdicts:
            print(sentence)
        found = audit.to_json()
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "audit.json", found)
        print(f"page: {write_audit_page(self.out, found)}")
        return 0

    def _check_other_audit(self) -> None:
        """Refuse a folder that holds the audit of another model; one of this model is renewed."""
        file = self.out / "audit.json"
        theirs = json.loads(file.read_bytes())["checkpoint"] if file.is_file() else self.model
        if theirs != self.model:
            raise ConfigError(
                f"out={str(self.out)!r}: holds the audit of {theirs}; give another folder"
            )

    def _read_prompts(self) -> list["Prompt"]:
        """The first prompts of the file, or as many of a built-in task."""
        import numpy as np

        from moe_rl.tasks import task_of
        from moe_rl.tasks.dataset import read_prompts

        built_in = next((name for name in BUILT_IN if name == self.prompts), None)
        task = TaskConfig(
            task=built_in or "dataset",
            dataset=None if built_in else self.prompts,
            prompt_column=self.prompt_column,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            instruction=self.instruction,
            chat=self.chat,
        )
        if built_in is None:
            return read_prompts(task)[: self.num_prompts]
        rng = np.random.default_rng(self.seed)
        return [problem.prompt for problem in task_of(task).prompts(rng, self.num_prompts)]
