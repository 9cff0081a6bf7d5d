"""The recipes by name, and one run of any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_train import launch
from dpo_train.errors import ConfigError
from dpo_train.recipes import dialogue, sentiment, summarise, winrates
from dpo_train.recipes.corpora import smollm2
from dpo_train.recipes.flow import MODEL, Flow, Setting, load
from dpo_train.recipes.results import RESULTS_JSON, RESULTS_MD, Results, write
from dpo_train.tracking import Tracking


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment of the paper."""

    title: str
    sizes: type
    run: Callable[[Flow], Results]


RECIPES: Mapping[str, Recipe] = {
    "sentiment": Recipe(title=sentiment.TITLE, sizes=sentiment.Sizes, run=sentiment.run),
    "dialogue": Recipe(
        title=dialogue.TASK.title, sizes=winrates.Sizes, run=lambda flow: winrates.run(flow, dialogue.TASK)
    ),
    "summarise": Recipe(
        title=summarise.TASK.title, sizes=winrates.Sizes, run=lambda flow: winrates.run(flow, summarise.TASK)
    ),
}


def setting(name: str, folder: Path, overrides: Sequence[str], *, scale: float, model: str | None) -> Setting:
    """What the recipe would run. The default model is put into the folder, if it is not there.

    Raises:
        ConfigError: a value cannot be.
        MissingPackageError: the default model's package is not installed.
    """
    if not 0 < scale <= 1000:
        raise ConfigError("--scale is out of range", got=f"{scale:g}", expected="above 0 and at most 1000, e.g. 0.25")
    folder = folder.absolute()
    found = load(name, RECIPES[name].sizes, folder, overrides, scale=scale, model=model)
    if found.config.model.path == str(folder / "assets" / MODEL):
        smollm2(Path(found.config.model.path))
    return found


def run(name: str, given: Setting) -> Results:
    """Runs a recipe, from where an earlier run stopped; its results go to ``<folder>/<name>`` and to MLflow."""
    launch.use_storage(given.config)
    with launch.session(given.config):
        run_id = launch.open_run(given.config, f"recipe {name}")
        results = RECIPES[name].run(Flow(given, run_id))
        target = given.folder / name
        write(results, target)
        tracking = Tracking(given.config)
        with tracking.errors():
            for file in (RESULTS_JSON, RESULTS_MD, *(f"{figure.name}.png" for figure in results.figures)):
                tracking.client.log_artifact(run_id, str(target / file))
        tracking.end(run_id, "FINISHED")
    return results
