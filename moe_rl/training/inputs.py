"""The files a run reads, checked and pinned before it begins, while that is cheap.

Importable without torch.
"""

import dataclasses
from pathlib import Path

from moe_rl.config import RunConfig, TaskConfig
from moe_rl.policy.folder import check_model_folder
from moe_rl.runtime.extras import import_extra
from moe_rl.tasks.dataset import Dataset


def resolved(config: RunConfig) -> RunConfig:
    """The run with its arm spelled out and its dataset pinned to what the file holds.

    Raises:
        ConfigError: a dataset that cannot be read, or was changed since the config was written.
    """
    return dataclasses.replace(config.named(), task=pinned(config.task))


def pinned(task: TaskConfig) -> TaskConfig:
    """The task with the sha256 of the file it reads, if it reads one.

    Raises:
        ConfigError: see `Dataset`.
    """
    if task.task != "dataset":
        return task
    return dataclasses.replace(task, dataset_sha256=Dataset(**task.options()).sha256)


def check_checkpoint(config: RunConfig) -> None:
    """Refuse a checkpoint folder that cannot be a whole model, if the run starts from one.

    Raises:
        ConfigError: see `check_model_folder`.
    """
    folder = config.model.checkpoint
    if folder is not None:
        check_model_folder(Path(folder), f"checkpoint={folder!r}")


def check_engine(config: RunConfig) -> None:
    """Refuse a rollout engine whose package is not installed.

    Raises:
        ConfigError: names the extra that brings it.
    """
    if config.engine == "vllm":
        import_extra("vllm", extra="vllm", option="engine='vllm'")
