"""What a model answers to held-out prompts, with each answer's reward and how far it lies from the reference.

prompts --model--> answers --judge--> rewards                   an output at an address of its own: asked once
        --reference--> log-probs of the very answers --> KL
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_train.artifacts import Artifact, Output, Summary, discard
from dpo_train.config import EndpointJudge, RunConfig
from dpo_train.data.shards import Split, list_sums
from dpo_train.errors import ConfigError, DataError, RunError
from dpo_train.evaluate import judge as judging
from dpo_train.evaluate.samples import divergence, turn_ends
from dpo_train.evaluate.statistics import Floats, Means, wilson
from dpo_train.findings import Estimate
from dpo_train.progress import Reporter
from dpo_train.recipes.flow import code_of
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.evaluate_judge import reward_answers
from dpo_train.stages.evaluate_models import WORK, Asked, ask, prompt_tables
from dpo_train.stages.evaluate_samples import answer_tables, distinct_prompts
from dpo_train.stages.executor import Executor
from dpo_train.stages.with_model import PARTS

ANSWERS_FILE, REWARDS_FILE = "answers.parquet", "rewards.json"

_COLUMNS = ("pair_id", "group", "dataset", "prompt", "prompt_ids", "chosen", "chosen_ids", "truncated_chosen")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of one model: rows of (pair_id, temperature, index, answer, truncated, reward, log_ratio).

    ``log_ratio`` is log policy - log reference of the whole answer, at temperature 1 and of a trained policy alone.
    """

    table: pa.Table

    def at(self, temperature: float) -> pa.Table:
        """Those of one temperature, by prompt and number."""
        found = self.table.filter(pc.equal(self.table["temperature"], temperature))
        return found.sort_by([("pair_id", "ascending"), ("index", "ascending")])

    def kl(self) -> Estimate:
        """KL(policy || reference) in nats per answer, from the answers at temperature 1; 0 of the reference itself.

        Raises:
            RunError: there is one prompt alone.
        """
        rows = _first(self.at(1.0))
        found = divergence(self.log_ratios(), np.ones(len(rows)), rows["pair_id"].to_pylist())
        if found is None:
            raise RunError("One prompt says nothing about the spread of the KL", fix="ask more held-out prompts")
        return found.kl

    def log_ratios(self) -> Floats:
        """[G] log policy - log reference of the first answer to each prompt at temperature 1; 0 of the reference."""
        return np.array(_first(self.at(1.0))["log_ratio"].fill_null(0.0), dtype=np.float64)

    def rewards(self, *, best_of: int = 1) -> Floats:
        """[G] reward of the best of so many answers to each prompt at temperature 1, prompts in the order of their ids;
        NaN where there is none, or no finite one."""
        rewards_G = np.array(self.best_of(best_of)["reward"].to_pylist(), dtype=np.float64)
        return np.where(np.isfinite(rewards_G), rewards_G, np.nan)

    def best_of(self, number: int, temperature: float = 1.0) -> pa.Table:
        """The answer of the largest reward among the first ``number`` to each prompt; rows as those of ``at``."""
        rows = self.at(temperature)
        rows = rows.filter(pc.less(rows["index"], number))
        return _first(rows.sort_by([("reward", "descending"), ("index", "ascending")]))


def best_of_kl(number: int) -> float:
    """log N - (N - 1) / N: what best-of-N may be away from the model that it samples, in nats, at most (Beirami et al.,
    arXiv 2401.01879)."""
    return math.log(number) - (number - 1) / number


def outcomes(ours: pa.Table, theirs: Mapping[str, float | None]) -> dict[str, float]:
    """By pair_id 1 where the first answer to a prompt has a larger reward than the prompt's other one, 0.5 for a tie.

    Args:
        ours: rows of (pair_id, index, reward).
        theirs: reward by pair_id. Where one of both has none, there is no outcome.
    """
    rows = _first(ours)
    pairs = zip(rows["pair_id"].to_pylist(), rows["reward"].to_pylist(), strict=True)
    return {
        pair_id: float(reward > other) + 0.5 * (reward == other)
        for pair_id, reward in pairs
        if reward is not None and (other := theirs[pair_id]) is not None
    }


def win_rate(found: Mapping[str, float]) -> Estimate:
    """The mean of outcomes.

    Raises:
        RunError: there are none.
    """
    if not found:
        raise RunError("The judge rewards none of the answers with a number", fix="mend evaluate.judge")
    return wilson(sum(found.values()), float(len(found)), n=len(found))


def gained(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Estimate:
    """By how much our win rate is larger than theirs, over the prompts of which both have outcomes."""
    both = sorted(ours.keys() & theirs.keys())
    differences_N = np.array([ours[pair_id] - theirs[pair_id] for pair_id in both])
    return Means({"": differences_N}, np.arange(len(both)), seed=0).mean("")


def heldout_prompts(scored: Artifact, split: str, count: int, *, dataset: int | None = None) -> pa.Table:
    """A pair of each of ``count`` prompts; of the source of that number alone, if one is given."""
    pairs = Split(scored, split).table(_COLUMNS)
    found = distinct_prompts(pairs if dataset is None else pairs.filter(pc.equal(pairs["dataset"], dataset)), count)
    if len(found) < 2:
        which = "" if dataset is None else f" of source {dataset}"
        raise DataError(
            f"There are too few {split} prompts{which} to measure anything on",
            got=len(found),
            expected="many, at least 2",
        )
    return found


def rewards_of_chosen(
    config: RunConfig, prompts: pa.Table, executor: Executor, *, inputs: Mapping[str, str]
) -> Artifact:
    """The reward of each prompt's chosen answer; see ``read_rewards``. ``inputs`` name the prompts."""

    def body(out: Output) -> Summary:
        wanted = list(zip(prompts["pair_id"].to_pylist(), prompts["chosen"].to_pylist(), strict=True))
        found = _rewards(config, prompts, wanted, executor, Reporter.from_environment("answers"))
        out.write_json(REWARDS_FILE, {pair_id: found[pair_id, answer] for pair_id, answer in wanted})
        return Summary(details={"summary": f"{len(wanted)} chosen answers rewarded"})

    content = {
        "judge": dict(_identity(config)),
        "prompts": prompts["pair_id"].to_pylist(),
        "code": code_of("answers"),
    }
    return make(config, "chosen", content, inputs, body, output=None)


def read_rewards(artifact: Artifact) -> dict[str, float | None]:
    """What ``rewards_of_chosen`` has found, by pair_id."""
    found: dict[str, float | None] = json.loads(artifact.file(REWARDS_FILE).read_text(encoding="utf-8"))
    return found


def answers(
    config: RunConfig,
    prompts: pa.Table,
    executor: Executor,
    *,
    inputs: Mapping[str, str],
    policy: Artifact | None = None,
    folder: str | None = None,
    temperatures: Sequence[float] = (1.0,),
    count: int = 1,
) -> Artifact:
    """Asks a model; ``read`` gives the answers back.

    Args:
        config: its model is the reference.
        prompts: from ``heldout_prompts``.
        inputs: digests that name the prompts.
        policy: a training's output, or that of ``along``; None: the reference itself.
        folder: a whole model's instead.
        count: answers to each prompt at every temperature.

    Raises:
        ConfigError: there is no judge that rewards.
    """
    reporter = Reporter.from_environment("answers")
    asked = Asked(name="reference", model=config.model, end_ids=turn_ends(prompts))
    inputs = {**inputs, "model": model_digest(config)}
    if policy is not None:
        asked = replace(asked, name="policy", weights=policy, frozen_base=config.train.lora is not None)
        inputs["policy"] = policy.record.digest
    elif folder is not None:
        trained = replace(config.model, path=folder, adapter=None)
        asked = replace(asked, name="policy", model=trained)
        inputs["policy"] = model_digest(replace(config, model=trained))
    content = {
        "temperatures": list(temperatures),
        "count": count,
        "prompts": prompts["pair_id"].to_pylist(),
        "seed": config.seed,
        "max_sample_tokens": config.evaluate.max_sample_tokens,
        "judge": dict(_identity(config)),
        "code": code_of("answers"),
    }

    def body(out: Output) -> Summary:
        tables = [
            table
            for temperature in temperatures
            for table in prompt_tables(
                prompts["pair_id"],
                prompts["prompt_ids"],
                (temperature,),
                size=config.evaluate.sample_batch,
                count=count,
            )
        ]
        said = ask(config, asked, out, executor, reporter, prompts=tables).answers
        assert said is not None, "there are prompts"
        table = _measured(config, asked, said, prompts, executor, out, reporter)
        pq.write_table(table, out.path / ANSWERS_FILE, compression="zstd")
        return Summary(counts={"answers": len(table)}, details={"summary": f"{len(table)} answers"})

    made = make(config, "answers", content, inputs, body, output=None, resumable=True, scratch=(WORK, PARTS))
    if not made.reused:
        for scratch in (WORK, PARTS):
            discard(made.home, scratch, tell=reporter.message)
    return made


def _measured(
    config: RunConfig,
    asked: Asked,
    answers: pa.Table,
    prompts: pa.Table,
    executor: Executor,
    out: Output,
    reporter: Reporter,
) -> pa.Table:
    """The answers with their rewards and log-ratios."""
    wanted = list(zip(answers["pair_id"].to_pylist(), answers["answer"].to_pylist(), strict=True))
    rewards = _rewards(config, prompts, sorted(set(wanted)), executor, reporter)
    ratios = _log_ratios(config, asked, answers, prompts, executor, out, reporter)
    table = answers.select(["pair_id", "temperature", "index", "answer", "truncated"])
    table = table.append_column("reward", pa.array([rewards[each] for each in wanted], pa.float64()))
    return table.append_column("log_ratio", ratios)


def read(artifact: Artifact) -> Answers:
    """The answers of an output of ``answers``."""
    return Answers(table=pq.read_table(artifact.file(ANSWERS_FILE)))


def _log_ratios(
    config: RunConfig,
    asked: Asked,
    answers: pa.Table,
    prompts: pa.Table,
    executor: Executor,
    out: Output,
    reporter: Reporter,
) -> pa.Array:
    """[N] of each answer; null of the reference's own, and at other temperatures than 1."""
    nothing = pa.nulls(len(answers), pa.float64())
    if asked.name != "policy":
        return nothing
    # Several answers to one prompt have one pair_id, and are told apart by a number in its place.
    names = pa.array([f"{place}" for place in range(len(answers))])
    named = answers.set_column(answers.column_names.index("pair_id"), "pair_id", names)
    pure = named.filter(pc.equal(named["temperature"], 1.0))
    if not len(pure):
        return nothing
    of_prompt = dict(zip(prompts["pair_id"].to_pylist(), prompts["prompt_ids"].to_pylist(), strict=True))
    whose = [answers["pair_id"][int(name)].as_py() for name in pure["pair_id"].to_pylist()]
    like_prompts = pa.table(
        {
            "pair_id": pure["pair_id"],
            "prompt_ids": pa.array([of_prompt[pair_id] for pair_id in whose], pa.list_(pa.int32())),
        }
    )
    reference = Asked(name="reference", model=config.model, end_ids=asked.end_ids)
    scores = ask(config, reference, out, executor, reporter, pairs=answer_tables(pure, like_prompts)).scores
    assert scores is not None, "there are answers"
    theirs = dict(zip(scores["pair_id"].to_pylist(), list_sums(scores["chosen_logps"]).tolist(), strict=True))
    ours = dict(zip(pure["pair_id"].to_pylist(), pure["logps"].to_pylist(), strict=True))
    return pa.array([ours[name] - theirs[name] if name in ours else None for name in names.to_pylist()], pa.float64())


def _rewards(
    config: RunConfig, prompts: pa.Table, wanted: Sequence[tuple[str, str]], executor: Executor, reporter: Reporter
) -> dict[tuple[str, str], float | None]:
    judge = config.evaluate.judge
    assert judge is not None, "asked for its identity before"
    assert not isinstance(judge, EndpointJudge), "likewise"
    rows = {row["pair_id"]: row for row in prompts.select(["pair_id", "prompt"]).to_pylist()}
    return reward_answers(config, judge, rows, wanted, executor, reporter)


def _identity(config: RunConfig) -> Mapping[str, object]:
    judge = config.evaluate.judge
    if judge is None or isinstance(judge, EndpointJudge):
        raise ConfigError(
            "A recipe needs a judge that rewards each answer by itself",
            got="no judge" if judge is None else f"kind: {judge.kind}",
            expected="evaluate.judge of kind reward_model or function",
        )
    return judging.identity(judge)


def _first(rows: pa.Table) -> pa.Table:
    """The first row of each prompt, in the order of prompts."""
    _, places = np.unique(np.array(rows["pair_id"].to_pylist()), return_index=True)
    return rows.take(pa.array(places))
