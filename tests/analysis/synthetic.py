"""Tests of analysis: synthetic studies with known outcomes, in the run-folder schema.

Every number is a pure function of (arm profile, seed, step, update); no trainer is involved.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K, POSITIONS = 4, 16, 2, 17


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What an arm of a synthetic study does."""

    plateau: float = 0.9  # reward it climbs to
    collapse_at: float | None = None  # share of the run at which the reward starts to fall
    final: float = 0.1  # reward it falls to
    churn: float = 0.1  # at the last update
    clip: float = 0.003
    token_log_sd: float = 0.25  # of log w at the last update
    routing_share: float = 0.6
    grad_norm: float = 0.5
    spread: float = 0.02  # standard deviation over seeds of the plateau
    tail: float = 0.1  # P(w > 10) at the last update, over the sampling engine's at all times
    unbounded: float = 0.05  # share of the gradient's mass with A < 0 and w above the clip range


PROFILES = {
    "grpo": Profile(
        plateau=0.78, collapse_at=0.6, final=0.12, token_log_sd=0.6, grad_norm=1.0,
        tail=3.0, unbounded=0.4,
    ),
    "grpo+dual-clip": Profile(plateau=0.86, token_log_sd=0.5, tail=2.5, unbounded=0.1),
    "grpo+rollout-old": Profile(plateau=0.85, token_log_sd=0.2),
    "grpo+replay": Profile(plateau=0.88, token_log_sd=0.2, churn=0.08, clip=0.002),
    "gspo": Profile(plateau=0.93, token_log_sd=0.15, churn=0.06, clip=0.32, grad_norm=0.3),
    "gspo+replay": Profile(plateau=0.93, token_log_sd=0.12, churn=0.06, clip=0.3, grad_norm=0.3),
    "dense": Profile(plateau=0.97, churn=0.0, routing_share=0.0, token_log_sd=0.1),
    "dense-gspo": Profile(plateau=0.96, churn=0.0, routing_share=0.0, token_log_sd=0.1),
    "frozen-router": Profile(plateau=0.9, churn=0.05, token_log_sd=0.2, routing_share=0.4),
}  # fmt: skip
MAIN_ARMS = ["grpo", "grpo+replay", "gspo"]


def write_study(
    root: Path,
    *,
    arms: list[str] | None = None,
    seeds: int = 5,
    settings: tuple[str, ...] = ("staleness",),
    steps: int = 60,
    updates: int = 8,
    mode: str = "full",
    profiles: dict[str, Profile] | None = None,
    mismatch: bool = False,
    config: dict[str, Any] | None = None,
) -> Path:
    """A finished study; returns its folder. `config` overrides fields of every run's config."""
    arms = list(PROFILES) if arms is None else arms
    root.mkdir(parents=True, exist_ok=True)
    study = {
        "schema": 1, "name": "collapse", "mode": mode, "settings": list(settings),
        "arms": arms, "seeds": list(range(1, seeds + 1)), "command": f"moe-rl reproduce --{mode}",
        "runs": list(itertools.product(settings, arms, range(1, seeds + 1))),
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(study))
    for setting in settings:
        for arm in arms:
            profile = (PROFILES | (profiles or {}))[arm]
            for seed in range(1, seeds + 1):
                write_run(
                    root, setting, arm, seed, profile,
                    steps=steps, updates=updates, mismatch=mismatch, config=config,
                )  # fmt: skip
    return root


def write_map(root: Path, *, seeds: int = 3, noises: tuple[float, ...] = (0.0, 0.1)) -> Path:
    """A finished map: GRPO breaks from 4e-4, with replay from 8e-4, GSPO and dense never."""
    breaks = {"grpo": 4e-4, "grpo+replay": 8e-4, "gspo": 1.0, "dense": 1e-3}
    settings = []
    for noise in noises:
        for rate in (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3):
            for m in (4, 8, 16):
                name = f"lr{rate:.0e}_m{m}_noise{noise:g}"
                settings.append(name)
                for arm, limit in breaks.items():
                    base = PROFILES[arm]
                    falls = rate * (m / 8) ** 0.5 >= limit * (1 - noise)
                    profile = replace(base, collapse_at=0.5 if falls else None)
                    for seed in range(1, seeds + 1):
                        config = {
                            "learning_rate": rate, "updates_per_rollout": m, "router_noise": noise
                        }  # fmt: skip
                        write_run(
                            root, name, arm, seed, profile, steps=24, updates=2, config=config
                        )
    study = {
        "schema": 1, "name": "collapse map", "mode": "map", "settings": settings,
        "arms": list(breaks), "seeds": list(range(1, seeds + 1)), "command": "moe-rl map",
        "runs": list(itertools.product(settings, breaks, range(1, seeds + 1))),
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(study))
    return root


def write_run(
    root: Path,
    setting: str,
    arm: str,
    seed: int,
    profile: Profile,
    *,
    steps: int = 60,
    updates: int = 8,
    mismatch: bool = False,
    complete: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """One run folder under `root/runs`; `complete=False` leaves summary.json out."""
    folder = root / "runs" / setting / arm / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng([seed, len(arm), len(setting)])
    whole = run_config(setting, arm, seed, steps, updates) | (config or {})
    _write_json(folder / "config.json", {"schema": 1, "config": whole})
    plateau = profile.plateau + profile.spread * float(draw.normal())
    level = [_reward(profile, plateau, step / steps) for step in range(steps)]
    step_rows, update_rows = [], []
    for step in range(steps):
        reward = float(np.clip(level[step] + 0.015 * draw.normal(), 0, 1))
        step_rows.append(_step_row(step, reward, profile, mismatch, draw))
        for update in range(updates):
            stale = update / max(1, updates - 1)
            heat = 1 + 3 * max(0.0, 0.8 - level[step]) if profile.collapse_at else 1.0
            update_rows.append(_update_row(step, update, updates, stale, heat, profile, draw))
    for name, rows in (("steps", step_rows), ("updates", update_rows)):
        text = "".join(json.dumps(_encode(row)) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    if complete:
        _write_json(folder / "summary.json", _summary(step_rows))
    return folder


def run_config(setting: str, arm: str, seed: int, steps: int, updates: int) -> dict[str, Any]:
    """A nested config with the fields that the analysis reads, and a few it does not."""
    dense = arm.startswith("dense")
    return {
        "arm": arm,
        "setting": setting,
        "model": {
            "num_layers": LAYERS,
            "num_experts": TOP_K if dense else EXPERTS,
            "experts_per_token": TOP_K,
            "hidden_size": 96,
        },
        "task": {"task": "running_sum", "digits": 16},
        "cold_start": {"slip": 0.05},
        "algorithm": "gspo" if "gspo" in arm else "grpo",
        "routing_replay": "R2" if arm.endswith("replay") else "disabled",
        "router_noise": 0.0,
        "hidden_noise": 0.0,
        "freeze_router": arm == "frozen-router",
        "steps": steps,
        "updates_per_rollout": updates,
        "learning_rate": 3e-4,
        "max_grad_norm": 1.0,
        "seed": seed,
    }


def _reward(profile: Profile, plateau: float, share: float) -> float:
    level = 0.3 + (plateau - 0.3) * (1 - math.exp(-6 * share))
    if profile.collapse_at is None or share < profile.collapse_at:
        return level
    fall = (share - profile.collapse_at) / (1 - profile.collapse_at)
    return profile.final + (level - profile.final) * math.exp(-8 * fall)


def _step_row(
    step: int, reward: float, profile: Profile, mismatch: bool, draw: np.random.Generator
) -> dict[str, Any]:
    row = {
        "step": step, "learning_rate": 3e-4, "reward": reward, "reward_std": 0.4,
        "zero_std_groups": 0.2, "response_length": 17.0, "truncated": 0.0, "entropy": 0.4,
        "seconds": 1.6, "seconds_rollout": 0.5, "seconds_old_logprobs": 0.2,
        "seconds_updates": 0.8, "seconds_instruments": 0.1, "routing/margin": 0.5,
    }  # fmt: skip
    if mismatch:
        noise = float(np.exp(0.2 * draw.normal()))
        row |= {
            "mismatch/kl_k1": 1e-3 * noise, "mismatch/kl_k3": 1.2e-3 * noise,
            "mismatch/extreme_2": 0.004 * noise, "mismatch/churn": profile.churn * noise,
            "mismatch/router_disagreement": 1.7 * profile.churn * noise,
            "mismatch/token_disagreement": min(1.0, 4 * profile.churn * noise),
        }  # fmt: skip
    return row


def _update_row(
    step: int,
    update: int,
    updates: int,
    stale: float,
    heat: float,
    profile: Profile,
    draw: np.random.Generator,
) -> dict[str, Any]:
    jitter = float(np.exp(0.15 * draw.normal()))
    churn = profile.churn * stale**0.7 * jitter * (0.7 + 0.3 * heat)
    log_var = (profile.token_log_sd * stale * heat) ** 2 * jitter
    token_var = math.expm1(min(log_var, 600.0))
    layers = [churn * (0.6 + 0.8 * layer / max(1, LAYERS - 1)) for layer in range(LAYERS)]
    row: dict[str, Any] = {
        "step": step, "update": update, "learning_rate": 3e-4, "loss": 0.01,
        "grad_norm": profile.grad_norm * heat * jitter,
        "clip_ratio/low": 0.5 * profile.clip * stale, "clip_ratio/high": 0.5 * profile.clip * stale,
        "clip_ratio/region": profile.clip * stale * jitter,
        "ratio/token_log_mean": -log_var / 2, "ratio/token_log_var": log_var,
        "ratio/token_var": token_var, "ratio/token_ess": 1 / (1 + token_var),
        "ratio/sequence_log_var": log_var / POSITIONS,
        "ratio/sequence_var": math.expm1(min(log_var / POSITIONS, 600.0)),
        "ratio/sequence_ess": math.exp(-min(log_var / POSITIONS, 600.0)),
        "ratio/extreme_2": 0.001, "kl": log_var / 2,
        "routing/churn": churn, "routing/churn_per_layer": layers,
        "routing/router_disagreement": 1.7 * churn, "routing/token_disagreement": min(1, 4 * churn),
        "routing/margin": 0.5, "routing/shift": 0.98,
    }  # fmt: skip
    row |= _tails(profile, stale) | _branches(profile.unbounded * stale * min(1.0, jitter))
    if update == updates - 1:
        routing = profile.routing_share * log_var
        weight = max(0.0, 0.9 - profile.routing_share) * log_var
        row |= {
            "ratio/routing_part": routing, "ratio/weight_part": weight,
            "ratio/part_covariance": (log_var - routing - weight) / 2,
            "routing/churn_per_position": [
                churn * (0.8 + 0.4 * t / (POSITIONS - 1)) for t in range(POSITIONS)
            ],
        }  # fmt: skip
    return row


def _tails(profile: Profile, stale: float) -> dict[str, float]:
    """Power laws: the loss's with the profile's tail, the sampling engine's below 1/t."""
    shares = {}
    for t in (2, 10, 100, 1000):
        shares[f"ratio/survival_{t}"] = 0.1 * profile.tail * stale / t**0.7
        shares[f"rollout_ratio/survival_{t}"] = 0.0 if t == 1000 else 0.1 * stale / t
    return {"ratio/mean": 1 + profile.tail * stale, "rollout_ratio/mean": 1.0, **shares}


def _branches(unbounded: float) -> dict[str, float]:
    """Six shares that add up to 1; three in four tokens have a flipped router."""
    rest = 1 - unbounded
    shares = {
        "negative_above": unbounded, "negative_inside": 0.4 * rest, "negative_below": 0.0,
        "positive_below": 0.1 * rest, "positive_inside": 0.5 * rest, "positive_above": 0.0,
    }  # fmt: skip
    flipped = {f"branch/{name}_flipped": 0.75 * value for name, value in shares.items()}
    plain = {f"branch/{name}": value for name, value in shares.items()}
    return plain | flipped | {"branch/largest_token": 0.01 + 0.5 * unbounded}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = [row["reward"] for row in rows[-max(1, len(rows) // 8) :]]
    return {
        "schema": 1, "complete": True, "steps": len(rows), "seconds": 1.6 * len(rows),
        "seconds_rollout": 0.5 * len(rows), "seconds_old_logprobs": 0.2 * len(rows),
        "seconds_updates": 0.8 * len(rows), "seconds_instruments": 0.1 * len(rows),
        "instruments_share": 0.0625, "final_reward": float(np.mean(last)), "torch": "2.13.0",
        "transformers": "5.23.0", "threads": 1, "parameters": 1_234_567,
        "active_parameters": 345_678,
    }  # fmt: skip


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(_encode(value), indent=2))
