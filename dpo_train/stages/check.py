"""What must fit before a model is loaded: pairs, rows, vocabulary, reference. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_train.config import TrainConfig, ranking_mistakes
from dpo_train.data.shards import lengths, other_lengths
from dpo_train.errors import ConfigError, DataError, ModelError

SIDES = ("chosen", "rejected")


def check_rows(pairs: pa.Table, row_tokens: int, option: str, *, chosen_alone: bool = False) -> None:
    """A pair cannot be cut in two: the longest must fit into a row, with all its answers or the chosen one alone.

    Raises:
        ConfigError: it does not; the message names the pair and both lengths.
    """
    sizes = lengths(pairs, "prompt", "chosen") if chosen_alone else lengths(pairs)
    answers = "chosen answer" if chosen_alone else "all answers"
    if len(pairs) and (longest := int(sizes.max())) > row_tokens:
        pair_id = pairs["pair_id"][int(sizes.argmax())].as_py()
        raise ConfigError(
            "A pair is longer than a row",
            got=f"pair {pair_id} with {longest} tokens (prompt and {answers}), {option}={row_tokens}",
            fix=f"set {option} to {longest} or more, or lower prepare.max_prompt_tokens or prepare.max_answer_tokens",
        )


def check_model_reads(pairs: pa.Table, model: Path) -> None:
    """Every token must have a row in the model's embedding, and every position one that the model knows.

    Raises:
        ModelError: the tokenizer belongs to another model, or a sequence is longer than the model reads.
    """
    ids = [pc.max(pc.list_flatten(pairs[f"{part}_ids"])).as_py() for part in ("prompt", *SIDES)]
    rows, others = other_lengths(pairs, "other_ids")
    if len(rows):
        ids.append(pc.max(pc.list_flatten(pc.list_flatten(pairs["other_ids"]))).as_py())
    largest = max((found for found in ids if found is not None), default=-1)
    if (vocabulary := _text_config(model).get("vocab_size")) is not None and largest >= vocabulary:
        raise ModelError(
            f"The tokenizer in {model} does not match its model",
            got=f"token id {largest}, where the model's vocabulary has {vocabulary}",
            fix="use the tokenizer that the model was trained with",
        )
    sequences = [lengths(pairs, "prompt", side) for side in SIDES]
    sequences.append(lengths(pairs, "prompt")[rows] + others)
    longest = max(int(sizes.max(initial=0)) for sizes in sequences)
    if (positions := most_positions(model)) and longest > positions:
        raise ModelError(
            f"A prompt with its answer is longer than the model in {model} reads",
            got=f"{longest} tokens",
            expected=f"at most {positions}",
            fix="lower prepare.max_prompt_tokens or prepare.max_answer_tokens",
        )


def most_positions(model: Path) -> int | None:
    """Tokens of the longest sequence that the model in a folder reads, where its config says so."""
    config = _text_config(model)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        # Beyond this length it computes the whole row at other frequencies: a pair would change its neighbours.
        original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        return original or config.get("n_positions")
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_reference(pairs: pa.Table, path: str) -> None:
    """Each answer token must have its reference log-prob.

    Raises:
        DataError: some pairs have none, or too few; the message counts them and names the first.
    """
    for side in SIDES:
        name = f"reference_{side}_logps"
        if name not in pairs.column_names:
            raise DataError(f"{path} holds no reference log-probs", expected=f"a column {name}", fix=_SCORE_AGAIN)
        present = pc.fill_null(pc.list_value_length(pairs[name]), -1)
        missing = pc.not_equal(present, pc.list_value_length(pairs[f"{side}_ids"]))
        if count := pc.sum(missing).as_py():
            first = pc.index(missing, True).as_py()
            raise _misses_pairs(pairs, path, count, first, f"the {side} answer")
    tokens, scored = (other_lengths(pairs, name) for name in ("other_ids", "reference_other_logps"))
    if len(tokens[0]) and not (np.array_equal(tokens[0], scored[0]) and np.array_equal(tokens[1], scored[1])):
        both = [_by_row(len(pairs), *found) for found in (tokens, scored)]
        bad = [row for row, (wanted, got) in enumerate(zip(*both, strict=True)) if wanted != got]
        raise _misses_pairs(pairs, path, len(bad), bad[0], "the answers from the third on")


def check_rankings(pairs: pa.Table, config: TrainConfig) -> None:
    """Rankings need a loss that sees all of their answers.

    Raises:
        ConfigError: the configured one sees two; the message names the first ranking.
    """
    rows, _ = other_lengths(pairs, "other_ids")
    if len(rows) and (wrong := ranking_mistakes(config)):
        raise ConfigError(
            f"The pairs hold rankings of more than two answers: {'; '.join(wrong)}",
            got=f"{len(np.unique(rows))} of {len(pairs)}, the first of them {pairs['pair_id'][int(rows[0])].as_py()}",
            fix="set train.loss=plackett_luce, or prepare the data again with prepare.pairing=all or best_worst",
        )


_SCORE_AGAIN = "remove this output and run score-reference again"


def _misses_pairs(pairs: pa.Table, path: str, count: int, first: int, what: str) -> DataError:
    return DataError(
        f"The reference in {path} misses pairs",
        got=f"{count} of {len(pairs)} without one for each token of {what}, the first of them "
        + pairs["pair_id"][first].as_py(),
        fix=_SCORE_AGAIN,
    )


def _by_row(num_rows: int, rows: Any, sizes: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(num_rows)]
    for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
        found[row].append(size)
    return found


def _text_config(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return dict(content.get("text_config") or content)
