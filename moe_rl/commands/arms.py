"""`moe-rl arms`: what each arm of a study computes, and who else computes the same."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError

# Where the output goes into a file: wide enough that formulas keep their lines.
_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Arms(Command):
    """List the arms of studies, or print the recipe card of one."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """Arm whose recipe card is printed: a name of the table, or your own loss as FILE.py:FUNCTION.
    Default: the table of all arms."""
    markdown: bool = False
    """Print all cards in Markdown, as in docs/recipes.md."""

    def run(self) -> int:
        """Print the table, a card, or all cards."""
        from moe_rl.experiments import recipes

        if self.name is not None and self.markdown:
            raise ConfigError(f"--markdown with {self.name}: it prints all arms; leave one out")
        if self.name is not None:
            print(recipes.card(self.name).as_text())
        elif self.markdown:
            print(recipes.as_markdown(), end="")
        else:
            _print_table()
        return 0


def _print_table() -> None:
    """Name, options, formula, paper, defaults and no-op of every arm; a formula once."""
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table

    from moe_rl.experiments.recipes import all_cards

    table = Table(box=ASCII2, show_lines=True)
    for column in ("arm", "moe-rl train", "formula", "paper", "defaults", "when it is a no-op"):
        table.add_column(column, overflow="fold")
    first: dict[str, str] = {}  # formula -> the first arm that has it
    for card in all_cards():
        name = first.setdefault(card.formula, card.arm.name)
        formula = card.formula if name == card.arm.name else f"that of {name}"
        formula += f", with {card.recipe.given}" if card.recipe.given else ""
        rest = (card.arm.paper, card.defaults, card.no_op)
        table.add_row(card.arm.name, card.settings, formula, *rest)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
