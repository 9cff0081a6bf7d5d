"""Sampled answers as tables, what they look like, and how far the policy has moved by them.

N: answers, G: prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.evaluate.statistics import (
    FEW_GROUPS,
    Z_95,
    Floats,
    Means,
    cluster_bootstrap,
    number_groups,
    percentiles,
)
from dpo_train.findings import Divergence, Estimate, SampleFindings

PROMPTS_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("temperature", pa.float64()),
        ("index", pa.int32()),
    ]
)
"""One row per answer that is wanted. ``index`` numbers the samples of one prompt at one temperature."""

ANSWERS_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("temperature", pa.float64()),
        ("index", pa.int32()),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("truncated", pa.bool_()),
    ]
)
"""``answer_ids`` are all tokens that the model chose, so that their log-probs are those of the whole answer: the end
token is the last of them, unless the answer was cut off (``truncated``). ``answer`` is the text without it."""


def turn_ends(pairs: pa.Table) -> tuple[int, ...]:
    """The tokens that end answers in the data, of rows with ``chosen_ids`` and ``truncated_chosen``.

    A chat template may end turns with another token than the tokenizer's end of sequence.
    """
    whole = pairs["chosen_ids"].filter(pc.invert(pairs["truncated_chosen"]))
    return tuple(sorted({ids[-1] for ids in whole.to_pylist()}))


def answer_pairs(answers: pa.Table, prompt_ids: pa.ChunkedArray | pa.Array) -> pa.Table:
    """Prompts with their answers as pairs without a rejected answer, which scoring takes.

    Args:
        answers: ANSWERS_SCHEMA.
        prompt_ids: of each answer the prompt that it answers.
    """
    return pa.table(
        {
            "pair_id": answers["pair_id"],
            "prompt_ids": prompt_ids,
            "chosen_ids": answers["answer_ids"],
            "rejected_ids": pa.array([[]] * len(answers), pa.list_(pa.int32())),
        }
    )


def describe(answers: pa.Table, reference: pa.Table | None, *, model: str, seed: int) -> tuple[SampleFindings, ...]:
    """What answers look like, one entry per temperature, coldest first.

    Args:
        answers: of one model, ANSWERS_SCHEMA in any order.
        reference: the reference's, for the ratio of lengths over the prompts that both have answered.
        model: name of the model.
        seed: of the intervals, which resample prompts: answers to one prompt are not independent.
    """
    found = []
    for temperature in sorted(set(answers["temperature"].to_pylist())):
        of_reference = None if reference is None else _at(reference, temperature)
        found.append(_describe(_at(answers, temperature), of_reference, model, temperature, seed))
    return tuple(found)


def divergence(log_ratios_N: Floats, lengths_N: Floats, prompt_ids: Sequence[str]) -> Divergence | None:
    """KL(policy || reference) from answers that the policy gave: the mean of log policy - log reference.

    Unbiased, and so below 0 now and then where the two are close. An answer that is cut off after so many tokens counts
    as it is: the KL is that of answers of at most that length.

    Args:
        log_ratios_N: log policy - log reference of each whole answer, its end token counted.
        lengths_N: tokens of each answer, as they were scored.
        prompt_ids: of each answer the prompt; the standard error is clustered by it.

    Returns:
        None with fewer than two prompts, which say nothing about the spread between prompts.
    """
    num_groups = len(set(prompt_ids))
    if num_groups < 2:
        return None
    mean = float(log_ratios_N.mean())
    deviations_G = np.bincount(number_groups(prompt_ids), weights=log_ratios_N - mean)
    # Liang and Zeger's (1986) variance of a mean over clusters, with the usual factor for few of them.
    error = float(np.sqrt(num_groups / (num_groups - 1) * (deviations_G**2).sum()) / len(log_ratios_N))
    kl = Estimate(value=mean, low=mean - Z_95 * error, high=mean + Z_95 * error, n=len(log_ratios_N))
    return Divergence(
        kl=kl if num_groups >= FEW_GROUPS else cluster_bootstrap(log_ratios_N, prompt_ids, seed=0),
        standard_error=error,
        per_token=float(log_ratios_N.sum() / np.sum(lengths_N)),
    )


def _at(answers: pa.Table, temperature: float) -> list[dict[str, Any]]:
    """The rows of one temperature, in an order of their own."""
    rows = answers.filter(pc.equal(answers["temperature"], temperature)).to_pylist()
    return sorted(rows, key=lambda row: (row["pair_id"], row["index"]))


def _describe(
    rows: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]] | None,
    model: str,
    temperature: float,
    seed: int,
) -> SampleFindings:
    tokens = [_tokens(row) for row in rows]
    columns: dict[str, Iterable[float]] = {
        "length": map(len, tokens),
        "repetition": map(_repetition, tokens),
        "empty": (not _is_visible(row["answer"]) for row in rows),
        "truncated": (row["truncated"] for row in rows),
    }
    means = Means(
        {name: np.array(list(values), np.float64) for name, values in columns.items()},
        number_groups([row["pair_id"] for row in rows]),
        seed=seed,
    )
    return SampleFindings(
        model=model,
        temperature=temperature,
        length=means.mean("length"),
        length_ratio=None if reference is None else _length_ratio(rows, reference, seed),
        repetition=means.share("repetition"),
        distinct_1=_distinct(tokens, 1),
        distinct_2=_distinct(tokens, 2),
        empty=means.share("empty"),
        truncated=means.share("truncated"),
    )


def _tokens(row: Mapping[str, Any]) -> list[int]:
    """The answer's tokens without the one that ends it."""
    ids: list[int] = row["answer_ids"]
    return ids if row["truncated"] else ids[:-1]


def _ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(size)), strict=False))


def _repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that came before; an answer of fewer than four tokens repeats nothing."""
    found = _ngrams(ids, 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def _distinct(answers: Sequence[Sequence[int]], size: int) -> float:
    """Different n-grams of all answers together over all of them; 0 where there is none."""
    found = list(itertools.chain.from_iterable(_ngrams(ids, size) for ids in answers))
    return len(set(found)) / len(found) if found else 0.0


def _is_visible(text: str) -> bool:
    """Whether there is more to see than white space, controls and characters of no width."""
    return any(character.isprintable() and not character.isspace() for character in text)


def _length_ratio(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], seed: int
) -> Estimate | None:
    """Ratio of mean lengths over the prompts that both have answered; None: there is no such prompt.

    A reference whose answers have less than one token on average counts as one of one token.
    """
    ours, theirs = _mean_lengths(rows), _mean_lengths(reference)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    ours_G, theirs_G = (np.array([of[pair_id] for pair_id in shared]) for of in (ours, theirs))
    below, num_prompts = max(1.0, theirs_G.mean()), len(shared)
    value = float(ours_G.mean() / below)
    if num_prompts >= FEW_GROUPS:
        means = Means({"ours": ours_G, "theirs": theirs_G}, np.arange(num_prompts), seed=seed)
        ratios_R = means.replicates("ours") / np.maximum(1.0, means.replicates("theirs"))
        low, high = percentiles(ratios_R, num_prompts)
    else:
        # Student's interval of what each prompt adds to the ratio; of one prompt that is the ratio itself.
        parts_G = (ours_G - (value * theirs_G if num_prompts > 1 else 0.0)) / below
        spread = cluster_bootstrap(parts_G, shared, seed=seed)
        low, high = max(0.0, value + spread.low - spread.value), value + spread.high - spread.value
    return Estimate(value=value, low=low, high=high, n=num_prompts)


def _mean_lengths(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By prompt."""
    grouped = itertools.groupby(rows, key=lambda row: row["pair_id"])
    return {pair_id: float(np.mean([len(_tokens(row)) for row in of_prompt])) for pair_id, of_prompt in grouped}
