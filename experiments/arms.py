"""The arms: what a study compares. One entry here is all that an arm is, to studies and figures.

An arm is a small change to one base config, with the name, colour and line that it has everywhere.
The order of `ARMS` is the order of tables and legends. Importable without torch.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

from moe_rl.config import OWN_LOSS, ConfigError, RoutingReplay, RunConfig

Change = Callable[[RunConfig, RoutingReplay], RunConfig]
Dash = str | tuple[int, tuple[float, ...]]

_GSPO = "GSPO paper (arXiv 2507.18071)"


def _unchanged(base: RunConfig, replay: RoutingReplay) -> RunConfig:
    return base


def _with(**changes: Any) -> Change:
    """Changes that do not depend on the kind of replay."""
    return lambda base, replay: base.replace(**changes)


def _with_replay(**changes: Any) -> Change:
    return lambda base, replay: base.replace(**changes, routing_replay=replay)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a study."""

    name: str
    """As in run folders, tables of data and `--arms`."""
    label: str
    """As figures and tables print it."""
    colour: str = ""
    """On a light page: contrast of at least 3 to it; safe for common kinds of colour blindness.
    Empty: a spare colour and dash that no other arm of the table has."""
    dark_colour: str = ""
    """Its partner on a dark page."""
    dash: Dash = "-"
    """matplotlib line style, the second channel beside the colour."""
    paper: str
    """Where the arm is from."""
    change: Change = _unchanged
    """The base config and the kind of replay in, the arm's config out."""
    compare_with: tuple[str, ...] = ("grpo",)
    """Arms that its final reward is compared with on common seeds, in the paired table."""


_TABLE = (
    Arm(
        name="grpo",
        label="GRPO",
        colour="#d55e00",
        dark_colour="#ff8a3d",
        paper=f"DeepSeekMath (arXiv 2402.03300), as in the {_GSPO}, eq. 2-3",
        change=_with(algorithm="grpo"),
        compare_with=(),
    ),
    Arm(
        name="grpo+dual-clip",
        label="GRPO + dual clip",
        colour="#b08a00",
        dark_colour="#f0c52e",
        paper="dual-clip PPO (arXiv 1912.09729); on by default in verl",
        change=_with(algorithm="dual_clip"),
    ),
    Arm(
        name="grpo+rollout-old",
        label="GRPO over rollout log-probs",
        colour="#6a51a3",
        dark_colour="#a693d9",
        paper="verl's bypass mode, slime's --use-rollout-logprobs",
        change=_with(algorithm="grpo", old_logprobs="rollout"),
    ),
    Arm(
        name="grpo+mean-old",
        label="GRPO, mean of 8 old passes",
        paper="KwaiPilot, mean of 8 recomputed log-probs",
        change=_with(algorithm="grpo", old_passes=8),
    ),
    Arm(
        name="grpo+replay",
        label="GRPO + replay",
        colour="#0072b2",
        dark_colour="#4ba3e3",
        paper=f"Routing Replay: {_GSPO}, 5.3; R3: arXiv 2510.11370",
        change=_with_replay(algorithm="grpo"),
    ),
    Arm(
        name="grpo+trr",
        label="GRPO + replay of gate weights",
        paper="TRR: PrimeIntellect's prime-rl, #3509 and #3523",
        change=_with(algorithm="grpo", routing_replay="TRR"),
        compare_with=("grpo", "grpo+replay"),
    ),
    Arm(
        name="dr-grpo",
        label="Dr. GRPO",
        paper="Dr. GRPO (arXiv 2503.20783), 3.2",
        change=_with(algorithm="dr_grpo"),
    ),
    Arm(
        name="dapo",
        label="DAPO",
        paper="DAPO (arXiv 2503.14476), 3.1 and 3.3",
        change=_with(algorithm="dapo"),
    ),
    Arm(
        name="ppo",
        label="PPO with a value head",
        paper="PPO (arXiv 1707.06347); on language models: arXiv 1909.08593",
        change=_with(algorithm="ppo"),
    ),
    Arm(
        name="cispo",
        label="CISPO",
        paper="MiniMax-M1 (arXiv 2506.13585), 3.1",
        change=_with(algorithm="cispo"),
    ),
    Arm(
        name="tis",
        label="TIS",
        paper="truncated importance sampling, Flash-RL (2025)",
        change=_with(algorithm="tis"),
    ),
    Arm(
        name="mis",
        label="MIS",
        paper="masked importance sampling, Liu and Li (2025), 4.2.1",
        change=_with(algorithm="mis"),
    ),
    Arm(
        name="geo-rs",
        label="Geo-RS",
        paper="geometric rejection, Liu and Li (2025), part 3",
        change=_with(algorithm="geo_rs"),
    ),
    Arm(
        name="icepop",
        label="IcePop",
        paper="Ring-1T (arXiv 2510.18855)",
        change=_with(algorithm="icepop"),
    ),
    Arm(
        name="dppo-tv",
        label="DPPO-TV",
        paper="DPPO (arXiv 2602.04879), 3",
        change=_with(algorithm="dppo_tv", old_logprobs="rollout"),
    ),
    Arm(
        name="gmpo",
        label="GMPO",
        paper="GMPO (arXiv 2507.20673), eq. 4",
        change=_with(algorithm="gmpo"),
    ),
    Arm(
        name="sapo",
        label="SAPO",
        paper="SAPO (arXiv 2511.20347), eq. 5-6",
        change=_with(algorithm="sapo"),
    ),
    Arm(
        name="rspo",
        label="RSPO",
        paper="RSPO (arXiv 2510.23027v2)",
        change=_with(algorithm="rspo"),
    ),
    Arm(
        name="gspo",
        label="GSPO",
        colour="#009e73",
        dark_colour="#2fc79a",
        paper=f"{_GSPO}, 4.1, eq. 5-7",
        change=_with(algorithm="gspo"),
        compare_with=("grpo", "grpo+replay"),
    ),
    Arm(
        name="gspo-token",
        label="GSPO-token",
        paper=f"{_GSPO}, 4.3",
        change=_with(algorithm="gspo_token"),
    ),
    Arm(
        name="gspo+replay",
        label="GSPO + replay",
        colour="#3d9bd4",
        dark_colour="#8fd0f5",
        dash=(0, (4, 1.5)),
        paper=f"{_GSPO}, with the Routing Replay that it says is not needed",
        change=_with_replay(algorithm="gspo"),
        compare_with=("gspo",),
    ),
    Arm(
        name="policy-gradient",
        label="policy gradient",
        paper="our control: no ratio (Williams 1992)",
        change=_with(algorithm="policy_gradient"),
    ),
    Arm(
        name="positive-only",
        label="positive advantages only",
        paper="our control, after WAPO (arXiv 2606.16154)",
        change=_with(algorithm="positive_only"),
    ),
    Arm(
        name="dense",
        label="dense control",
        colour="#6d6d6d",
        dark_colour="#b4b4b4",
        dash=(0, (1, 1)),
        paper="our control: GRPO, equal active size, every expert always on",
        # As many experts as are active: no choice is left to the router.
        change=lambda base, replay: base.replace(
            algorithm="grpo", num_experts=base.model.experts_per_token
        ),
    ),
    Arm(
        name="dense-gspo",
        label="dense control, GSPO",
        paper="our control: GSPO, equal active size, every expert always on",
        change=lambda base, replay: base.replace(
            algorithm="gspo", num_experts=base.model.experts_per_token
        ),
        compare_with=("dense",),
    ),
    Arm(
        name="frozen-router",
        label="frozen router",
        colour="#b7589a",
        dark_colour="#e295c8",
        dash=(0, (5, 1, 1, 1)),
        paper="our control: GRPO, router weights stay at the cold start",
        change=_with(algorithm="grpo", freeze_router=True),
    ),
)

# Light and dark colours of the arms that have none of their own, and the dashes of their lines.
SPARE_COLOURS = (("#7570b3", "#a9a4e0"), ("#4d4d00", "#b3b34d"), ("#1b6f6f", "#63c2c2"))
_DASHES: tuple[Dash, ...] = (
    "-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1, 1, 1)), (0, (2.5, 1)), (0, (8, 1, 1, 1, 1, 1)),
)  # fmt: skip


def _spare_look(index: int) -> dict[str, Any]:
    """Colour and dash: what a table with that many arms before it has left."""
    light, dark = SPARE_COLOURS[index % len(SPARE_COLOURS)]
    return {
        "colour": light,
        "dark_colour": dark,
        "dash": _DASHES[index // len(SPARE_COLOURS) % len(_DASHES)],
    }


_PLAIN = [arm.name for arm in _TABLE if not arm.colour]
ARMS = {
    arm.name: arm if arm.colour else replace(arm, **_spare_look(_PLAIN.index(arm.name)))
    for arm in _TABLE
}
_NEEDS_ROUTER = {"grpo+replay", "grpo+trr", "gspo+replay", "rspo", "frozen-router"}
DENSE_ARMS = tuple(
    name for name in ARMS if name not in _NEEDS_ROUTER and not name.startswith("dense")
)
"""Arms that mean something for a model without routing."""
MAIN_ARMS = ("grpo", "grpo+replay", "gspo")
TWIST_ARM = "grpo+dual-clip"
"""It bounds one branch of the surrogate, changes neither routing nor the ratio, and GRPO holds."""
STORY_ARMS = (*MAIN_ARMS, "dense")
"""What maps, families and the first figure show: more lines would hide the story."""

# What a study adds to an arm of the table: the end of its name, and of its label.
_MORE = {
    "dual-clip": "+ dual clip",
    "R2": "+ R2",
    "R3": "+ R3",
    "rollout-old": "over rollout log-probs",
    "recomputed-old": "over recomputed log-probs",
    "clip-0.02": "with a clip of 0.02",
    "clip-3e-4": "with GSPO's clip range",
}
# Such an arm has the colour of the arm of the table that the change is known by, and a dash by the
# arm that it is added to.
_LOOKS_LIKE = {
    "dual-clip": "grpo+dual-clip",
    "R2": "gspo+replay",
    "R3": "grpo+replay",
    "rollout-old": "grpo+rollout-old",
}


def check_arms(names: Sequence[str]) -> None:
    """Refuse what is neither an arm of the table nor FILE.py:FUNCTION.

    Raises:
        ConfigError: names the arms nearest to it, or the function that has an arm's name.
    """
    for name in names:
        if OWN_LOSS.fullmatch(name) and (function := name.rpartition(":")[2]) in ARMS:
            raise ConfigError(
                f"arms={name!r}: {function} is an arm of the table, and reports would draw both as "
                "one; rename the function"
            )
        if name.endswith(".py"):
            raise ConfigError(f"arms={name!r}: which function of it? give {name}:FUNCTION")
        if name not in ARMS and not OWN_LOSS.fullmatch(name):
            nearest = difflib.get_close_matches(name, ARMS, n=3, cutoff=0.0)
            raise ConfigError(
                f"arms={name!r}: no such arm; nearest are "
                f"{', '.join(nearest)}. `moe-rl arms` lists them; your own loss is FILE.py:FUNCTION"
            )


def find_arm(name: str) -> Arm:
    """The arm of that name, or of the user's own loss FILE.py:FUNCTION, which goes by FUNCTION.

    A name that is neither, as reports find in run folders, is an arm too. Its colour depends on it,
    and so does its label if it is an arm of the table with more behind a plus: grpo+R3.
    """
    if name in ARMS:
        return ARMS[name]
    own = name.rpartition(":")[2]
    base, _, more = own.rpartition("+")
    look = _spare_look(crc32(own.encode()))
    if more in _LOOKS_LIKE:
        known = ARMS[_LOOKS_LIKE[more]]
        dash = "-" if base == "grpo" else _DASHES[1 + crc32(base.encode()) % (len(_DASHES) - 1)]
        look = {"colour": known.colour, "dark_colour": known.dark_colour, "dash": dash}
    label = f"{arm_label(base)} {_MORE[more]}" if more in _MORE else own
    change = _with(algorithm="grpo", loss=name) if OWN_LOSS.fullmatch(name) else _with()
    # What is added is a question to the arm that it is added to: it is none of GRPO's family.
    return Arm(
        name=own, label=label, paper="", change=change, compare_with=(base or "grpo",), **look
    )  # fmt: skip


def arm_label(name: str) -> str:
    """The arm's name as figures and tables print it."""
    return find_arm(name).label


def arm_key(name: str) -> tuple[int, str]:
    """Sort key: the arms of the table in its order, then others by name."""
    return (list(ARMS).index(name) if name in ARMS else len(ARMS), name)


def arm_config(name: str, base: RunConfig, *, replay: RoutingReplay, seed: int) -> RunConfig:
    """The config of one run of an arm in the setting `base`, from the cold start.

    Args:
        name: see `check_arms`.
        replay: the kind that the setting calls for.
        seed: paired over arms: equal seeds see equal prompts and sampling numbers.
    """
    arm = find_arm(name)
    return run_of(arm.change(base, replay), arm.name, seed)


def run_of(config: RunConfig, arm: str, seed: int) -> RunConfig:
    """The run of a study that carries this arm's name and seed."""
    # A study that loses its worst runs would flatter the arm that made them.
    return config.replace(arm=arm, seed=seed, on_nonfinite="skip")
