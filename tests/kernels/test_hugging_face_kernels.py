"""The folder kernels/ and the Hugging Face package `kernels` live side by side.

Each test starts Python in the repository root, where `import kernels` finds our folder first. The
stand-in is a distribution of that name on PYTHONPATH.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_TRANSFORMERS = (
    "import transformers; from transformers import Qwen3MoeForCausalLM; "
    "from transformers.utils import is_kernels_available; print(is_kernels_available())"
)

# Whatever transformers takes from the package exists; decorators leave what they decorate alone.
STAND_IN = """
from .layer import Mode
from .versions import __version__

class Anything:
    def __init__(self, *args, **kwargs): pass

def decorator(*args, **kwargs): return lambda decorated: decorated

def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything if name[0].isupper() else decorator
"""


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


needs_none_installed = pytest.mark.skipif(
    installed_version() is not None, reason="the Hugging Face package kernels is installed here"
)


def run_in_root(code: str, site: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": str(site or "")}
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a distribution `kernels` that this transformers accepts."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    package = tmp_path / "kernels"
    (package / "layer").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "versions.py").write_text(f"__version__ = {version!r}\n")
    (package / "layer" / "__init__.py").write_text("from .mode import Mode\n")
    (package / "layer" / "mode.py").write_text(
        "class Mode:\n    TRAINING = INFERENCE = TORCH_COMPILE = 1\n"
    )
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return tmp_path


def test_import_kernels_in_the_root_finds_the_installed_package(site: Path) -> None:
    code = "import kernels, importlib.metadata as m; print(kernels.__version__, kernels.__file__)"
    version, file = run_in_root(code, site).split()
    assert file == str(site / "kernels" / "__init__.py")
    assert (site / f"kernels-{version}.dist-info").exists()


def test_its_submodules_import_from_the_root(site: Path) -> None:
    code = "import kernels.layer.mode, kernels; print(kernels.layer.mode.__file__)"
    assert run_in_root(code, site) == str(site / "kernels" / "layer" / "mode.py")
    code = "from kernels.layer import Mode; print(Mode.__module__)"
    assert run_in_root(code, site) == "kernels.layer.mode"


def test_both_packages_work_in_one_process(site: Path) -> None:
    code = (
        "import kernels, moe_rl.kernels; assert 'token_logprobs' not in vars(kernels); "
        "print(moe_rl.kernels.token_logprobs.__module__, kernels.Mode.__module__)"
    )
    assert run_in_root(code, site) == "moe_rl.kernels.logprobs kernels.layer.mode"


def test_an_error_inside_the_installed_package_is_not_hidden(site: Path) -> None:
    (site / "kernels" / "versions.py").write_text("raise RuntimeError('broken wheel')\n")
    code = "try:\n    import kernels\nexcept RuntimeError as error: print(error)"
    assert run_in_root(code, site) == "broken wheel"


def test_transformers_uses_the_installed_package_from_the_root(site: Path) -> None:
    assert run_in_root(IMPORT_TRANSFORMERS, site) == "True"


@needs_none_installed
def test_transformers_sees_no_package_where_none_is_installed() -> None:
    assert run_in_root(IMPORT_TRANSFORMERS) == "False"


@needs_none_installed
def test_without_the_package_our_folder_is_an_empty_module() -> None:
    code = "import kernels; print([n for n in vars(kernels) if n == '__file__' or n[0] != '_'])"
    assert run_in_root(code) == "[]"
    code = "try:\n    import kernels.reference\nexcept ModuleNotFoundError as e: print(e.name)"
    assert run_in_root(code) == "kernels.reference"


@needs_none_installed
def test_a_stray_folder_of_that_name_is_not_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    code = "import kernels; print(list(kernels.__path__))"
    assert run_in_root(code, tmp_path) == "[]"


def test_another_copy_of_our_folder_is_passed_over(site: Path, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """Two checkouts on `sys.path` would hand over to each other without end."""
    other = tmp_path_factory.mktemp("other")
    (other / "kernels").mkdir()
    for file in (ROOT / "kernels").glob("*.py"):
        (other / "kernels" / file.name).write_bytes(file.read_bytes())
    code = (
        f"import sys; sys.path.insert(1, {str(other)!r}); import kernels; print(kernels.__file__)"
    )
    assert run_in_root(code, site) == str(site / "kernels" / "__init__.py")
