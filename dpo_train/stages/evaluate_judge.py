"""Sampled answers to comparisons, by the judge that the config names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_train import storage
from dpo_train.config import EndpointJudge, FunctionJudge, RewardModelJudge, RunConfig
from dpo_train.evaluate.judge import Endpoint, Judgement, Matchup, best_of, compare_rewards, rewarder, win_rate
from dpo_train.findings import Comparison
from dpo_train.progress import Reporter
from dpo_train.stages.common import storage_options
from dpo_train.stages.executor import Executor, TableFunction

REWARD_BATCH = 64
"""Answers of one unit of work for a judge that rewards."""

_OUTCOMES = {1.0: "won against {}", 0.5: "as good as {}", 0.0: "lost against {}"}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison, and the judge's word on each prompt."""

    comparison: Comparison
    judgements: Mapping[str, Judgement]

    def said_of(self, prompt_id: str) -> str:
        """The judge's word in words; empty where it gave none."""
        judgement = self.judgements.get(prompt_id)
        if judgement is None or judgement.outcome is None:
            return ""
        return _OUTCOMES.get(judgement.outcome, "").format(self.comparison.opponent)


def compare_answers(
    config: RunConfig, asked: pa.Table, answers: Mapping[str, pa.Table], executor: Executor, reporter: Reporter
) -> list[Compared]:
    """The policy's answers against each opponent's, at the first temperature."""
    judge = config.evaluate.judge
    if judge is None or not answers:
        return []
    temperature = config.evaluate.temperatures[0]
    prompts = {row["pair_id"]: row for row in asked.select(["pair_id", "prompt", "chosen"]).to_pylist()}
    texts = {model: _texts(table, temperature) for model, table in answers.items()}
    opponents = {"reference": _first(texts["reference"])}
    opponents["chosen"] = {pair_id: row["chosen"] for pair_id, row in prompts.items()}
    if "champion" in texts:
        opponents["champion"] = _first(texts["champion"])
    ours = _first(texts["policy"])
    if isinstance(judge, EndpointJudge):
        judged = ask_endpoint(judge, prompts, ours, opponents, reporter)
    else:
        judged = _by_rewards(config, judge, prompts, ours, opponents, texts["reference"], executor, reporter)
    name = judge.model if isinstance(judge, EndpointJudge) else judge.kind
    return [
        Compared(
            comparison=win_rate(
                list(found.values()), list(found), opponent=opponent, judge=name, temperature=temperature
            ),
            judgements=found,
        )
        for opponent, found in judged.items()
    ]


def _texts(answers: pa.Table, temperature: float) -> dict[str, list[str]]:
    """The answers to each prompt, by number."""
    rows = answers.filter(pc.equal(answers["temperature"], temperature)).sort_by("index").to_pylist()
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["pair_id"], []).append(row["answer"])
    return found


def _first(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {pair_id: several[0] for pair_id, several in texts.items()}


def _messages(row: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    return tuple({"role": message["role"], "content": message["content"]} for message in row["prompt"])


def ask_endpoint(
    judge: EndpointJudge,
    prompts: Mapping[str, Mapping[str, Any]],
    ours: Mapping[str, str],
    opponents: Mapping[str, Mapping[str, str]],
    reporter: Reporter,
) -> dict[str, dict[str, Judgement]]:
    """By opponent and prompt the judge's word.

    Args:
        prompts: by id rows with ``prompt``, a list of messages.
        ours: by prompt our answer.
        opponents: by name the same of others.
    """
    matchups = [
        (opponent, Matchup(prompt_id=pair_id, prompt=_messages(row), ours=ours[pair_id], theirs=theirs[pair_id]))
        for opponent, theirs in opponents.items()
        for pair_id, row in prompts.items()
    ]
    reporter.message(f"asking the judge {judge.model}")
    endpoint = Endpoint(judge, storage.cache_folder() / "judge")
    judgements = endpoint.compare(
        [matchup for _, matchup in matchups],
        progress=lambda done, total: reporter.progress(done, total, "comparisons"),
        tell=reporter.message,
    )
    found: dict[str, dict[str, Judgement]] = {opponent: {} for opponent in opponents}
    for (opponent, matchup), judgement in zip(matchups, judgements, strict=True):
        found[opponent][matchup.prompt_id] = judgement
    return found


def _by_rewards(
    config: RunConfig,
    judge: FunctionJudge | RewardModelJudge,
    prompts: Mapping[str, Mapping[str, Any]],
    ours: Mapping[str, str],
    opponents: Mapping[str, Mapping[str, str]],
    several: Mapping[str, Sequence[str]],
    executor: Executor,
    reporter: Reporter,
) -> dict[str, dict[str, Judgement]]:
    """Every different answer is rewarded once."""
    texts = [ours, *opponents.values()]
    wanted = {(pair_id, each[pair_id]) for each in texts for pair_id in prompts}
    if config.evaluate.best_of:
        wanted |= {(pair_id, answer) for pair_id, answers in several.items() for answer in answers}
    rewards = reward_answers(config, judge, prompts, sorted(wanted), executor, reporter)

    def of(each: Mapping[str, str]) -> list[float | None]:
        return [rewards[pair_id, each[pair_id]] for pair_id in prompts]

    if number := config.evaluate.best_of:
        best = {
            pair_id: answers[best_of([rewards[pair_id, answer] for answer in answers])]
            for pair_id, answers in several.items()
        }
        opponents = {**opponents, f"best of {number}": best}
    return {
        opponent: dict(zip(prompts, compare_rewards(of(ours), of(theirs)), strict=True))
        for opponent, theirs in opponents.items()
    }


def reward_answers(
    config: RunConfig,
    judge: FunctionJudge | RewardModelJudge,
    prompts: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[tuple[str, str]],
    executor: Executor,
    reporter: Reporter,
) -> dict[tuple[str, str], float | None]:
    """The rewards of answers, (prompt's id, answer); None where the judge can say nothing.

    Args:
        prompts: by id rows with ``prompt``, a list of messages.
    """
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table(
        {
            "id": [str(number) for number in range(len(wanted))],
            "prompt": pa.array([_messages(prompts[pair_id]) for pair_id, _ in wanted], message),
            "answer": [answer for _, answer in wanted],
        }
    )
    tasks = [table.slice(start, REWARD_BATCH) for start in range(0, len(table), REWARD_BATCH)]
    build = functools.partial(_build_rewarder, config, judge)
    reporter.message("rewarding the answers")
    found: dict[tuple[str, str], float | None] = {}
    for rewarded in executor.map_tables(build, tasks, uses_model=judge.kind == "reward_model"):
        for row in rewarded.to_pylist():
            found[wanted[int(row["id"])]] = row["reward"]
        reporter.progress(len(found), len(wanted), "answers")
    return found


def _build_rewarder(config: RunConfig, judge: FunctionJudge | RewardModelJudge) -> TableFunction:
    storage.use(storage_options(config))
    return rewarder(judge, config.compute.device)
