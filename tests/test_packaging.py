"""One import name over four folders, light imports, and commands that are what they say."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDER_OF = PYPROJECT["tool"]["setuptools"]["package-dir"]
LISTED = PYPROJECT["tool"]["setuptools"]["packages"]


def import_name(path: Path) -> str:
    """The dotted name under which a folder or file of the checkout is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    name = next(name for name, top in FOLDER_OF.items() if top == folder)
    return ".".join([name, *rest]).removesuffix(".__init__")


def sources() -> list[Path]:
    return [path for folder in FOLDER_OF.values() for path in sorted((ROOT / folder).rglob("*.py"))]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def test_every_folder_with_code_is_a_listed_package() -> None:
    on_disk = {import_name(path.parent) for path in sources()}
    assert sorted(LISTED) == sorted(on_disk), "pyproject.toml, [tool.setuptools] packages"


def test_every_package_has_an_init() -> None:
    without = {path.parent for path in sources() if not (path.parent / "__init__.py").exists()}
    assert not without, "without __init__.py the editable install loses the folder"


def test_the_editable_install_finds_every_package_in_its_folder(tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        f"for name in {LISTED}: print(name, find_spec(name).origin)"
    )
    found = dict(line.split(maxsplit=1) for line in run_python(code, tmp_path).splitlines())
    packages = [path for path in sources() if path.name == "__init__.py"]
    assert found == {import_name(path.parent): str(path) for path in packages}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: in the checkout setuptools would leave build/, and reuse it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDER_OF.values():
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.png")
        )
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", "dist", "."], cwd=copy, check=True)
    return next((copy / "dist").glob("*.whl"))


def test_a_wheel_holds_every_module_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    used_at_run_time = {".py", ".typed", ".html", ".css", ".js"}
    on_disk = {
        f"{import_name(path.parent).replace('.', '/')}/{path.name}"
        for folder in FOLDER_OF.values()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in used_at_run_time
    }
    in_wheel = {name for name in names if Path(name).suffix in used_at_run_time}
    assert in_wheel == on_disk, "pyproject.toml, [tool.setuptools] packages and package-data"
    assert "moe_rl/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_rl"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_of_a_wheel_imports_without_checkout_and_extras(
    wheel: Path, tmp_path: Path
) -> None:
    """None in sys.modules is how Python spells 'not installed', whatever is installed here."""
    extras = ["trl", "datasets", "wandb", "trackio", "tensorboard", "vllm", "megablocks"]
    extras += ["verl", "transfer_queue", "prime_rl", "ray", "submitit"]
    modules = [import_name(path) for path in sources() if path.name != "__main__.py"]
    for trainer in ("trl", "verl", "verl_engine", "verl_trainer"):  # these extend what they are for
        modules.remove(f"moe_rl.integrations.{trainer}")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"
        f"for name in {modules}: print(importlib.import_module(name).__file__)"
    )
    files = run_python(code, tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert all(Path(file).is_relative_to(tmp_path) for file in files), files


def test_importing_moe_rl_imports_nothing_else(tmp_path: Path) -> None:
    code = "import sys; old = set(sys.modules); import moe_rl; print(*set(sys.modules) - old)"
    assert run_python(code, tmp_path) == "moe_rl"


def test_every_dependency_is_pinned_inside_its_range() -> None:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").open())
    pins = dict(line.lower().split("==") for line in lines if line)
    assert not [pin for pin in pins.values() if "+" in pin], "one machine's build is nobody else's"
    project = PYPROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        if requirement.name == "vllm":  # never installed here: it pins a torch of its own
            continue
        assert requirement.name in pins, f"constraints.txt has no {requirement.name}"
        assert pins[requirement.name] in requirement.specifier, requirement


def test_ci_runs_the_commands_a_contributor_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert [command.partition(" ||")[0] for command in commands] == [
        "make check", "make vllm", "make test",
    ]  # fmt: skip
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_commands_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:`|^ *)make ([a-z-]+)", text, re.M))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named and named <= targets, named - targets
