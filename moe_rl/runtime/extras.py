"""Optional packages: imported by the function that needs them, or refused in one line."""

import importlib
from types import ModuleType

from moe_rl.runtime.strict import ConfigError


def import_extra(module: str, *, extra: str, option: str) -> ModuleType:
    """Import a module of an optional package, which an extra of this project installs.

    Raises:
        ConfigError: the import failed; begins with the user's `option`, as in `tracker='wandb'`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: {module} cannot be imported ({error}); run pip install 'moe-rl[{extra}]'"
        ) from error
