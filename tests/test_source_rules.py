"""What no source file of the project may hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moe_rl", "kernels", "analysis", "experiments")
TEXT = {".py", ".toml", ".txt", ".md", ".yaml", ".css", ".js"}

# Reading a file through any of these runs code that whoever wrote the file chose.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {
    *("torch.load", "torch.save", "read_pickle", "to_pickle"),
    *("trust_remote_code", "allow_pickle"),
}


def unsafe(tree: ast.AST) -> list[str]:
    """Every use of pickle, torch.load or remote code in a syntax tree, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        modules, names = [], []
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom():
                modules = [node.module or ""]
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Attribute():
                names = [node.attr, ast.unparse(node)]
            case ast.keyword():
                names = [node.arg]
            case ast.Constant():
                names = [node.value]
        bad = [name for name in modules if name.split(".")[0] in UNSAFE_MODULES]
        bad += [name for name in names if name in UNSAFE_NAMES]
        found += [f"{node.lineno}: {name}" for name in bad]
    return found


def test_nothing_reads_a_file_that_could_run_code() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = {str(path): unsafe(ast.parse(path.read_text())) for path in paths}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "state = torch.load(path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, **{'trust_remote_code': True})",
    ],
)
def test_the_search_for_unsafe_reads_finds(line: str) -> None:
    assert unsafe(ast.parse(line))


def test_text_files_are_ascii() -> None:
    folders = [ROOT / folder for folder in (*FOLDERS, "tests", "docs")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in TEXT]
    paths += [path for path in ROOT.iterdir() if path.suffix in TEXT]
    paths += [ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert not [str(path) for path in paths if not path.read_bytes().isascii()]
