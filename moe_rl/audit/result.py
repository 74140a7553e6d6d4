"""What an audit found, as a table for the terminal and as audit.json."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from moe_rl.audit.difference import Difference
from moe_rl.audit.verdict import shape_verdict, verdict
from moe_rl.audit.ways import Kind, Missing

SCHEMA = 1
HEADING = (
    f"{'against the reference':<28} {'routers':>8} {'tokens':>8} {'KL k3':>9} {'replayed':>9} "
    f"{'F(2)':>8}"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The rollout whose tokens are read, and how many are read at once."""

    group_size: int = 4
    """Responses to each prompt."""
    max_tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    """At which the rollout is sampled; 1: the model's own distribution."""
    seed: int = 0
    """Of the rollout's random numbers."""
    sequences_per_pass: int = 32
    """Sequences that one forward pass reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reading, and what it differs in."""

    name: str
    """As in the table."""
    kind: Kind
    """What differs between it and the reference: numerics, engine, batch shape and so on."""
    difference: Difference
    """How far, over response tokens."""

    def describe(self) -> str:
        """A line of the table that `HEADING` heads."""
        found = self.difference
        replayed = "-" if found.replayed is None else f"{found.replayed.kl_k3:.1e}"
        return (
            f"{self.name:<28} {found.router_disagreement:8.2%} {found.token_disagreement:8.2%} "
            f"{found.live.kl_k3:9.1e} {replayed:>9} {found.live.extreme_2:8.2%}"
        )


@dataclass(kw_only=True)
class Audit:
    """Everything that was measured; `to_json` writes it."""

    checkpoint: str
    """Path or hub id."""
    model: str
    """Class and sizes."""
    reference: str
    """What all others are held against."""
    sample: Sample
    prompts: int
    """Distinct prompts."""
    tokens: int
    """Response tokens, over which all is compared."""
    margin_unit: str
    """Whether margins are of logits, or of the scores that the router sorts."""
    rows: list[Row] = field(default_factory=list)
    """What was read, in that order."""
    missing: list[Missing] = field(default_factory=list)
    """What could not be read here, with the reason."""
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and machine."""

    @property
    def verdicts(self) -> list[str]:
        """Sentences, the numerics and engines first."""
        found = [
            verdict(row.name, row.kind, row.difference)
            for kind in ("engine", "trace", "numerics")
            for row in self.rows
            if row.kind == kind
        ]
        for kind, what in (
            ("experts", "Experts backends"),
            ("shape", "Batch shapes, padding and cache"),
            ("again", "The same pass twice"),
        ):
            rows = [(row.name, row.difference) for row in self.rows if row.kind == kind]
            if rows:
                found.append(shape_verdict(rows, what))
        return found

    def to_json(self) -> dict[str, Any]:
        """What audit.json holds."""
        rows = [
            {"name": row.name, "kind": row.kind}
            | dataclasses.asdict(row.difference)
            | {"removed": row.difference.removed}
            for row in self.rows
        ]
        own = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("rows", "missing", "sample")
        }
        return {
            "schema": SCHEMA,
            **own,
            "sample": dataclasses.asdict(self.sample),
            "verdicts": self.verdicts,
            "rows": rows,
            "missing": [missing._asdict() for missing in self.missing],
        }
