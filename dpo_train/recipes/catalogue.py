"""The recipes by name, and one run of any of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_train import launch
from dpo_train.config import EndpointJudge
from dpo_train.errors import ConfigError
from dpo_train.evaluate import judge as judging
from dpo_train.recipes import dialogue, sentiment, summarise, winrates
from dpo_train.recipes.corpora import smollm2
from dpo_train.recipes.flow import MODEL, Flow, Setting, load
from dpo_train.recipes.results import RESULTS_JSON, RESULTS_MD, Results, write
from dpo_train.tracking import Tracking


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment of the paper."""

    sizes: type
    check: Callable[[Setting], None]
    run: Callable[[Flow], Results]


RECIPES: Mapping[str, Recipe] = {
    "sentiment": Recipe(sizes=sentiment.Sizes, check=sentiment.check, run=sentiment.run),
    "dialogue": Recipe(
        sizes=winrates.Sizes, check=lambda _: None, run=functools.partial(winrates.run, task=dialogue.TASK)
    ),
    "summarise": Recipe(
        sizes=winrates.Sizes, check=lambda _: None, run=functools.partial(winrates.run, task=summarise.TASK)
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
    judge = found.config.evaluate.judge
    if judge is None or isinstance(judge, EndpointJudge):
        raise ConfigError(
            "A recipe needs a judge that rewards each answer by itself",
            got="none" if judge is None else f"kind: {judge.kind}",
            expected="evaluate.judge of kind reward_model or function, or the recipe's own",
        )
    if found.has_own_judge:
        judging.check(judge)
    RECIPES[name].check(found)
    if found.config.model.path == str(folder / "assets" / MODEL):
        smollm2(Path(found.config.model.path))
    return found


def run(name: str, given: Setting) -> Results:
    """Runs a recipe, from where an earlier run stopped; its results go to ``<folder>/<name>`` and to MLflow."""
    launch.use_storage(given.config)
    with launch.session(given.config):
        run_id = launch.open_run(given.config, f"recipe {name}")
        try:
            results = RECIPES[name].run(Flow(given, run_id))
        except BaseException as error:
            launch.close_run(given.config, run_id, error)
            raise
        target = given.folder / name
        write(results, target)
        tracking = Tracking(given.config)
        with tracking.errors():
            for file in (RESULTS_JSON, RESULTS_MD, *(f"{figure.name}.png" for figure in results.figures)):
                tracking.client.log_artifact(run_id, str(target / file))
        tracking.end(run_id, "FINISHED")
    return results
