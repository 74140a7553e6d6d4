"""What the TRL integration refuses, and what it says then."""

import ast
import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from tiny_trl import Spy, build, own_engine, tiny_model

from moe_rl.integrations.trl_support import require_same_tokens, require_support, require_tested_trl

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mode", ["R2", "R3", "disabled"])
def test_a_model_without_routers_is_refused(tmp_path: Path, mode: Any) -> None:
    dense = tiny_model("qwen3")
    with pytest.raises(ValueError, match="has no top-k router"):
        build(tmp_path, model=dense, routing_replay=mode, rollout_func=own_engine)


def test_a_model_without_routers_trains_with_everything_off(tmp_path: Path) -> None:
    dense = tiny_model("qwen3")
    settings = {"max_steps": 1, "router_aux_loss_coef": None}
    build(tmp_path, model=dense, args=settings, routing_diagnostics=False).train()


def test_a_family_whose_replay_is_refused_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phimoe", num_local_experts=8)
    with pytest.raises(ValueError, match="sparsemixer"):
        build(tmp_path, model=model, routing_replay="R2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"routing_replay": "R4"},
            "routing_replay='R4': unknown; expected one of disab",
        ),
        ({"routing_replay": "TRR"}, "'TRR': unknown; expected one of disabled, R2, R3"),
        ({"routing_replay": "R3"}, "pass a rollout_func that returns 'routed_experts'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)


def without_routes(out: dict[str, Any]) -> None:
    del out["routed_experts"]


def with_routes(change: Any) -> Any:
    def apply(out: dict[str, Any]) -> None:
        out["routed_experts"] = change(out["routed_experts"])

    return apply


def lose(rows: list[Any]) -> list[Any]:
    """The first response token of the last completion is predicted without a route."""
    rows[-1] = rows[-1].clone()
    rows[-1][-2] = -1
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_routes, "rollout_func: it returned no 'routed_experts'"),
        (with_routes(lambda rows: rows[:-1]), "7 entries of .* positions for 8 completions"),
        (with_routes(lambda rows: [*rows[:3], None, *rows[4:]]), "sequence 3 has none; turn the"),
        (with_routes(lambda rows: [rows[0][:-2], *rows[1:]]), "in it one row per token, or one l"),
        (with_routes(lambda rows: [row[:, :1] for row in rows]), "the model has 2 MoE layers"),
        (with_routes(lambda rows: [row + 8 for row in rows]), "but the model has 8 experts"),
        (with_routes(lambda rows: [0 * row for row in rows]), "every recorded id is 0"),
        (with_routes(lose), "2 .token, layer. pairs have no record where a response token is"),
    ],
)
def test_routes_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    def engine(prompts: list[str], trainer: Any) -> dict[str, Any]:
        out = own_engine(prompts, trainer)
        change(out)
        return out

    settings = {"num_iterations": 1, "max_steps": 1}
    trainer = build(tmp_path, args=settings, routing_replay="R3", rollout_func=engine)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_batch_that_was_changed_after_the_rollout_is_refused(tmp_path: Path) -> None:
    class Packing(Spy):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            cut = {name: inputs[name][:, :-1] for name in ("completion_ids", "completion_mask")}
            return super()._compute_loss(model, {**inputs, **cut})

    trainer = build(tmp_path, kind=Packing, routing_replay="R2")
    with pytest.raises(ValueError, match="something changed the batch after the rollout"):
        trainer.train()
    require_same_tokens(torch.zeros(2, 5, 1, 1), torch.zeros(2, 5))


def test_images_are_refused() -> None:
    trainer = SimpleNamespace(model=tiny_model(), _is_vlm=True, routing_replay="R2")
    with pytest.raises(ValueError, match="processing_class: image tokens"):
        require_support(trainer)


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        build(tmp_path, peft_config=adapter, routing_replay="R2")


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.0.0.dev0", "none"])
def test_a_missing_or_untested_trl_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    def installed(name: str) -> str:
        if version == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    message = rf"trl: version {version} is installed.*tested with 1.16; pip install 'moe-rl\[trl\]'"
    with pytest.raises(ImportError, match=message):
        require_tested_trl()


def test_nothing_else_in_the_package_imports_the_integrations() -> None:
    folders = ("moe_rl", "kernels", "analysis", "experiments")
    own = ROOT / "moe_rl" / "integrations"
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in paths:
        if path.is_relative_to(own):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if "moe_rl.integrations" in name], path
