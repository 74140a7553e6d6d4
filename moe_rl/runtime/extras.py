"""Optional packages: imported by the function that needs them, or refused in one line."""

import importlib
from types import ModuleType

from moe_rl.config import ConfigError


def import_extra(module: str, *, extra: str, option: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: dotted name.
        extra: extra of this project that installs it.
        option: what the user asked for, as in `tracker='wandb'`.

    Raises:
        ConfigError: the import failed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: {module} cannot be imported ({error}); run pip install 'moe-rl[{extra}]'"
        ) from error
