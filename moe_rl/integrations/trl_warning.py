"""Integrations: a callback that warns, inside TRL's GRPOTrainer, when a collapse is foretold.

    from moe_rl.integrations.trl_warning import WarnOfCollapse

    trainer = RoutingReplayGRPOTrainer(..., callbacks=[WarnOfCollapse()])

It reads the trainer's logs, so `logging_steps=1` serves it best. docs/warning.md says what its
thresholds are worth.
"""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from moe_rl.analysis.warning.judge import alarm, read_signals, warning_words
from moe_rl.analysis.warning.thresholds import COMMITTED, read_thresholds
from moe_rl.metrics.names import ours_of

_OURS = ours_of("trl")


class WarnOfCollapse(TrainerCallback):
    """Warns once, by `warnings.warn`, when the deciding signal passes its threshold.

    It is the one that tells best of those that the trainer logs.

    A step is a rollout with all its updates, and is judged when it has ended. The thresholds come
    from small models: what they are worth on a large one nobody has measured.

    Args:
        thresholds: file of `moe-rl warning`; default: the one that comes with this version.

    Raises:
        AnalysisError: a file that holds no thresholds.
    """

    def __init__(self, thresholds: Path = COMMITTED) -> None:
        self.thresholds = read_thresholds(thresholds)
        self.warned = False
        self._lines: list[dict[str, float]] = []
        if not any(rule.warns for rule in self.thresholds.signals):
            warnings.warn(
                f"{thresholds.name}: no signal predicts a collapse better than chance, so nothing "
                "will warn of one",
                stacklevel=2,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take in the line of an update; judge the rollouts that have ended."""
        if self.warned or not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        micro_steps = args.steps_per_generation * args.num_iterations
        updates = max(1, micro_steps // args.gradient_accumulation_steps)  # a rollout
        line = {_OURS.get(name, name): value for name, value in logs.items()}
        self._lines.append(line | {"step": (state.global_step - 1) // updates})
        lines = pd.DataFrame(self._lines)
        ended = lines[lines["step"] < state.global_step // updates]
        if ended.empty:
            return
        # What is of the whole rollout, as the reward, TRL logs in the line of its first update.
        steps = ended.groupby("step", as_index=False).mean(numeric_only=True)
        passed = alarm(read_signals(steps, ended, self.thresholds))
        if passed:
            self.warned = True
            step = state.global_step
            warnings.warn(f"update {step}: {warning_words(passed)}", stacklevel=2)
