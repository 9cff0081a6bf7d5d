"""Held-out prompts to answers of policy, reference and champion, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.artifacts import Output
from dpo_train.config import RunConfig
from dpo_train.data.folder import model_folder
from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.shards import lengths, list_sums
from dpo_train.errors import ConfigError, ModelError
from dpo_train.evaluate.report import Sample
from dpo_train.evaluate.samples import answer_pairs, describe, divergence, turn_ends
from dpo_train.findings import Comparison, Divergence, SampleFindings
from dpo_train.progress import Reporter
from dpo_train.stages.evaluate_judge import Compared, compare_answers
from dpo_train.stages.evaluate_models import SCORE_COLUMNS, Asked, ask, pair_tables, prompt_tables
from dpo_train.stages.executor import Executor
from dpo_train.stages.prepare_inputs import chat_template, token_options

TRIED_PAIRS = 200
"""Pairs by which it is found out whether the champion reads the same tokens as the policy."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the models said, and what was made of it."""

    policy_scores: pa.Table
    champion_scores: pa.Table | None
    answers: pa.Table | None
    divergence: Divergence | None
    described: tuple[SampleFindings, ...]
    comparisons: tuple[Comparison, ...]
    shown: tuple[Sample, ...]
    notes: tuple[str, ...]


def answered(
    config: RunConfig,
    heldout: pa.Table,
    models: Mapping[str, Asked],
    out: Output,
    executor: Executor,
    reporter: Reporter,
) -> Samples:
    """Asks every model for what the config wants to know of it.

    Raises:
        ConfigError: an answer might not fit into a row.
    """
    section = config.evaluate
    asked = distinct_prompts(heldout, section.num_prompts)
    check_lengths(asked, config)
    notes: list[str] = []
    answers: dict[str, pa.Table] = {}
    temperatures = section.temperatures
    of_policy = temperatures if 1.0 in temperatures else (*temperatures, 1.0)
    policy = ask(
        config, models["policy"], out, executor, reporter,
        pairs=pair_tables(heldout.select(SCORE_COLUMNS)),
        prompts=_prompts(config, asked, asked["prompt_ids"], of_policy),
    )  # fmt: skip
    found = None
    if policy.answers is not None:
        pure = policy.answers.filter(pc.equal(policy.answers["temperature"], 1.0))
        reference = ask(
            config, models["reference"], out, executor, reporter, pairs=answer_tables(pure, asked),
            prompts=_prompts(config, asked, asked["prompt_ids"], temperatures, section.best_of or 1),
        )  # fmt: skip
        found = estimate_kl(pure, reference.scores)
        answers |= {"policy": policy.answers, "reference": reference.answers}
    champion_scores = None
    if "champion" in models:
        reading = _read_by(models["champion"], heldout, asked, config, notes)
        champion = ask(
            config, replace(models["champion"], end_ids=reading.end_ids), out, executor, reporter,
            pairs=() if reading.pairs is None else pair_tables(reading.pairs),
            prompts=() if reading.prompt_ids is None else _prompts(config, asked, reading.prompt_ids, temperatures),
        )  # fmt: skip
        champion_scores = champion.scores
        answers |= {} if champion.answers is None else {"champion": champion.answers}
    compared = compare_answers(config, asked, answers, executor, reporter)
    firsts = {model: _first_of_each(table) for model, table in answers.items()}
    return Samples(
        policy_scores=policy.scores,
        champion_scores=champion_scores,
        answers=_all_answers(answers),
        divergence=found,
        described=_described(firsts, temperatures, config.seed),
        comparisons=tuple(each.comparison for each in compared),
        shown=_shown(asked, firsts, compared, temperatures[0], section.shown_samples) if answers else (),
        notes=tuple(notes),
    )


def distinct_prompts(pairs: pa.Table, count: int) -> pa.Table:
    """A pair of each of ``count`` prompts, at most one of a group: answers are taken for independent of each other.

    In the order of the pairs' ids, which is that of no file.
    """
    order = np.argsort(np.array(pairs["pair_id"].to_pylist(), dtype=object), kind="stable")
    prompts, groups = pairs["prompt_ids"], pairs["group"].to_pylist()
    seen: set[str] = set()
    rows: list[int] = []
    for row in order.tolist():
        if len(rows) == count:
            break
        keys = {f"group {groups[row]}", f"prompt {prompts[row].as_py()}"}
        if not keys & seen:
            seen |= keys
            rows.append(row)
    return pairs.take(pa.array(rows, pa.int64()))


def check_lengths(asked: pa.Table, config: RunConfig) -> None:
    """Raises:
    ConfigError: a prompt with its longest answer might not fit into a row.
    """
    section = config.evaluate
    longest = int(lengths(asked, "prompt").max(initial=0)) + section.max_sample_tokens
    if len(asked) and longest > section.row_tokens:
        raise ConfigError(
            "A prompt with its sampled answer may be longer than a row",
            got=f"{longest} tokens, evaluate.row_tokens={section.row_tokens}",
            fix=f"set evaluate.row_tokens to {longest} or more, or lower evaluate.max_sample_tokens",
        )


def _prompts(
    config: RunConfig, asked: pa.Table, prompt_ids: Any, temperatures: Sequence[float], count: int = 1
) -> list[pa.Table]:
    size = config.evaluate.sample_batch
    return prompt_tables(asked["pair_id"], prompt_ids, temperatures, size=size, count=count) if len(asked) else []


def answer_tables(answers: pa.Table, asked: pa.Table) -> list[pa.Table]:
    """The policy's answers with their prompts, in the very tables in which it scored them itself."""
    prompts = dict(zip(asked["pair_id"].to_pylist(), asked["prompt_ids"].to_pylist(), strict=True))
    tables = [answers.filter(pc.equal(answers["scored_with"], first)) for first in pc.unique(answers["scored_with"])]
    integers = pa.list_(pa.int32())
    return [
        answer_pairs(table, pa.array([prompts[pair_id] for pair_id in table["pair_id"].to_pylist()], integers))
        for table in tables
    ]


def estimate_kl(answers: pa.Table, reference: pa.Table) -> Divergence | None:
    """The KL from answers with their log-probs under the policy, and those under the reference."""
    ratios = answer_log_ratios(answers, reference)
    return divergence(
        np.array(list(ratios.values())),
        np.array([len(each) for each in answers["answer_ids"].to_pylist()], dtype=np.float64),
        list(ratios),
    )


def answer_log_ratios(answers: pa.Table, reference: pa.Table) -> dict[str, float]:
    """log policy - log reference by ``pair_id``, in the order of the answers, of which there is one to each."""
    theirs = dict(zip(reference["pair_id"].to_pylist(), list_sums(reference["chosen_logps"]).tolist(), strict=True))
    ours = zip(answers["pair_id"].to_pylist(), answers["logps"].to_pylist(), strict=True)
    return {pair_id: logp - theirs[pair_id] for pair_id, logp in ours}


class _Reading(NamedTuple):
    """What the champion can be asked: pairs to score, prompts in its own tokens, and what ends its answers."""

    pairs: pa.Table | None
    prompt_ids: Any
    end_ids: tuple[int, ...]


def _read_by(champion: Asked, heldout: pa.Table, asked: pa.Table, config: RunConfig, notes: list[str]) -> _Reading:
    """What the champion is asked.

    A champion with another tokenizer or chat template gives log-probs of other tokens, which cannot be set against the
    reference's; its answers can be compared all the same. One that cannot read the pairs at all is asked nothing.
    """
    from dpo_train.data.tokens import PairTokenizer, load_tokenizer

    # Over all sets: they lie one after the other.
    rows = np.unique(np.linspace(0, len(heldout) - 1, min(TRIED_PAIRS, len(heldout))).astype(np.int64))
    tried = heldout.take(pa.array(rows))
    try:
        tokenizer = load_tokenizer(
            model_folder(champion.model.path), trust_remote_code=champion.model.trust_remote_code
        )
        reader = PairTokenizer(tokenizer, token_options(config.prepare, chat_template(config)))
    except (ModelError, ConfigError) as error:
        notes.append(f"The champion is not compared: {error}")
        return _Reading(None, None, ())
    encoded = [each for each in reader.encode_many(_pairs(tried)) if not isinstance(each, Rejection)]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    own = [[list(getattr(each.tokens, name)) for name in columns] for each in encoded]
    if own == [[row[name] for name in columns] for row in tried.select(columns).to_pylist()]:
        return _Reading(heldout.select(SCORE_COLUMNS), asked["prompt_ids"], turn_ends(heldout))
    prompts = [each for each in reader.encode_many(_pairs(asked)) if not isinstance(each, Rejection)]
    if len(prompts) < len(asked) or not encoded:
        notes.append(
            f"The champion is not compared: its chat template cannot write {len(asked) - len(prompts)} of "
            f"{len(asked)} prompts"
        )
        return _Reading(None, None, ())
    notes.append(
        "The champion reads other tokens than the policy (another tokenizer or chat template): its answers are "
        "compared, its log-probs are not"
    )
    ends = {int(each.tokens.chosen_ids[-1]) for each in encoded if not each.truncated_chosen}
    prompt_ids = pa.array([each.tokens.prompt_ids.tolist() for each in prompts], pa.list_(pa.int32()))
    return _Reading(None, prompt_ids, tuple(sorted(ends)))


def _pairs(table: pa.Table) -> list[PreferencePair]:
    return [
        PreferencePair(
            prompt=tuple(Message(**message) for message in row["prompt"]),
            chosen=Message("assistant", row["chosen"], row["chosen_extra"] or ""),
            rejected=Message("assistant", row["rejected"], row["rejected_extra"] or ""),
            group=row["group"],
            tools=row["tools"] or "",
        )
        for row in table.to_pylist()
    ]


def _first_of_each(answers: pa.Table) -> pa.Table:
    """Without those that best-of-N draws on top."""
    return answers.filter(pc.equal(answers["index"], 0))


def _described(answers: Mapping[str, pa.Table], temperatures: Sequence[float], seed: int) -> tuple[SampleFindings, ...]:
    """Of each model and temperature, in the order in which the config has the temperatures: rules look at the first."""
    found: list[SampleFindings] = []
    for model, table in answers.items():
        at = table.filter(pc.is_in(table["temperature"], pa.array(temperatures, pa.float64())))
        each = describe(at, None if model == "reference" else answers["reference"], model=model, seed=seed)
        found += sorted(each, key=lambda one: temperatures.index(one.temperature))
    return tuple(found)


def _all_answers(answers: Mapping[str, pa.Table]) -> pa.Table | None:
    """One table: which model said what."""
    if not answers:
        return None
    columns = ["pair_id", "temperature", "index", "answer", "answer_ids", "truncated"]
    named = [
        table.select(columns).add_column(0, "model", pa.array([model] * len(table))) for model, table in answers.items()
    ]
    return pa.concat_tables(named)


def _shown(
    asked: pa.Table,
    answers: Mapping[str, pa.Table],
    compared: Sequence[Compared],
    temperature: float,
    count: int,
) -> tuple[Sample, ...]:
    """The first prompts with all answers side by side."""
    by_model = {
        model: {row["pair_id"]: row for row in table.filter(pc.equal(table["temperature"], temperature)).to_pylist()}
        for model, table in answers.items()
    }
    samples = []
    for row in asked.slice(0, count).to_pylist():
        said = {model: rows[row["pair_id"]] for model, rows in by_model.items()}
        order = [model for model in ("reference", "policy", "champion") if model in said]
        notes: dict[str, str] = {model: "cut off" for model in order if said[model]["truncated"]}
        outcomes = [each.said_of(row["pair_id"]) for each in compared]
        if told := [text for text in outcomes if text]:
            notes["policy"] = "; ".join([*([notes["policy"]] if "policy" in notes else []), *told])
        samples.append(
            Sample(
                prompt="\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"]),
                answers={"chosen (data)": row["chosen"], **{model: said[model]["answer"] for model in order}},
                notes=notes,
            )
        )
    return tuple(samples)
