"""Whether the judge of film snippets agrees with people: against the mean of the ratings that twenty of them gave.

The ratings come with vaderSentiment's source distribution (Hutto and Gilbert 2014). Many are of snippets that the judge
was trained on, so that only those of other films count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RewardModelJudge, RunConfig
from dpo_train.data.folder import model_folder, weights_digest
from dpo_train.errors import DataError
from dpo_train.progress import Reporter
from dpo_train.recipes.corpora import RatedSnippet, fetch_ratings, film_snippets, normalised, rated_snippets
from dpo_train.recipes.flow import Flow, code_of
from dpo_train.recipes.snippets import not_the_judges
from dpo_train.stages.common import make
from dpo_train.stages.evaluate_judge import reward_answers
from dpo_train.stages.executor import Executor

MOST = 1000
"""Snippets that are asked about; a correlation is then known to 0.03."""


def rated(flow: Flow, config: RunConfig) -> str:
    """How well the config's judge agrees with people, or why that is not known, in words."""
    folder = flow.setting.folder / "assets"
    try:
        fetch_ratings(folder)
        snippets = rated_snippets(folder)
    except DataError as error:
        return f"the judge was not compared with people's ratings: {error}"
    made = flow.step("ratings", lambda executor: _compared(config, snippets, executor))
    return str(made.record.details["summary"])


def _compared(config: RunConfig, snippets: Sequence[RatedSnippet], executor: Executor) -> Artifact:
    judge = config.evaluate.judge
    assert isinstance(judge, RewardModelJudge), "the recipe's own"
    of_others = {normalised(each.text) for each in not_the_judges(film_snippets(), config.seed)}
    asked = sorted({each.text: each.rating for each in snippets if normalised(each.text) in of_others}.items())
    random.Random(config.seed).shuffle(asked)
    asked = asked[:MOST]

    def body(out: Output) -> Summary:
        del out
        wanted = [("", text) for text, _ in asked]
        reporter = Reporter.from_environment("ratings")
        rewards = reward_answers(config, judge, {"": {"prompt": []}}, wanted, executor, reporter)
        ratings_N = np.array([rating for _, rating in asked])
        rewards_N = np.array([rewards[each] for each in wanted], dtype=np.float64)
        correlation = float(np.corrcoef(ratings_N, rewards_N)[0, 1])
        right = float(np.mean((rewards_N > 0) == (ratings_N > 0)))
        told = (
            f"against people's mean ratings of {len(asked)} snippets of films that it has not seen, the judge has "
            f"r = {correlation:.2f}, and the same sign for {right:.0%}"
        )
        return Summary(metrics={"correlation": correlation, "same_sign": right}, details={"summary": told})

    content = {"asked": [list(each) for each in asked], "code": code_of("ratings")}
    inputs = {"judge": weights_digest(model_folder(judge.path))}
    return make(config, "ratings", content, inputs, body, output=None)
