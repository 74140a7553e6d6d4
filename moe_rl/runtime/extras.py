"""Optional packages: imported by the function that needs them, or refused in one clear line."""

import importlib
from types import ModuleType

from moe_rl.config import ConfigError


def import_extra(module: str, *, extra: str, option: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of this project that installs it.
        option: what the user asked for, as in `tracker='wandb'`.

    Raises:
        ConfigError: it cannot be imported; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: {module} cannot be imported ({error}); "
            f"pip install 'moe-rl[{extra}]' brings it"
        ) from error
