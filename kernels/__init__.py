"""moe_rl.kernels: per-token log-probabilities of a language-model head, defined by slow code.

`token_logprobs` is the one function; `reference.py` is its definition and docs/kernels.md its
contract. This package knows nothing of configurations, trainers or logging.

The folder is called `kernels`, and so is a Hugging Face package that transformers imports. With the
repository root first on `sys.path` (`python -c`, `python -m pytest`) their `import kernels` finds
this file under the name `kernels`; it then hands over to the real package, so that transformers
sees what it would see from any other working directory.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    def _hand_over() -> None:
        """Put the installed package `kernels` into `sys.modules`, or leave an empty module there.

        The import system returns what `sys.modules` holds after this file has run, and takes the
        path for `kernels.layer` from it too, so nothing of this folder is left behind.
        """
        for entry in sys.path:
            spec = PathFinder.find_spec("kernels", [entry])
            if spec is None or spec.loader is None or spec.origin is None:
                continue
            # Ours, here or in another copy or link of this folder: it would hand over without end.
            if "moe_rl.kernels: " in Path(spec.origin).read_text(encoding="utf-8")[:99]:
                continue
            sys.modules["kernels"] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules["kernels"])
            return
        # transformers takes a module that has neither `__version__` nor `__file__` for a stray
        # folder, and continues as if nothing were installed.
        del sys.modules["kernels"].__file__
        sys.modules["kernels"].__path__ = []

    _hand_over()
    del _hand_over, sys, PathFinder, module_from_spec, Path
else:
    from moe_rl.kernels.choose import choose_backend
    from moe_rl.kernels.logprobs import TokenLogprobs, token_logprobs
    from moe_rl.kernels.patch import Patch, patch
    from moe_rl.kernels.routing_stats import RoutingStatistics, routing_statistics

    __all__ = [
        "Patch",
        "RoutingStatistics",
        "TokenLogprobs",
        "choose_backend",
        "patch",
        "routing_statistics",
        "token_logprobs",
    ]
