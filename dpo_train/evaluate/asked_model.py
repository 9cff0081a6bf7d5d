"""One model of an evaluation, in a worker: tables of pairs to log-probs, tables of prompts to answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from dpo_train.data.shards import list_sums
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import answer_pairs
from dpo_train.model.load import Policy
from dpo_train.model.score_table import ScoreTable


class AskedModel:
    """Pairs to SCORES_SCHEMA; PROMPTS_SCHEMA to ANSWERS_SCHEMA, with two more columns where answers are scored.

    ``logps`` is the log-prob of the whole answer, and ``scored_with`` the same text for all answers of a table. In bf16
    the same tokens among other neighbours in a row give sums that differ by 0.4 nats RMS: who compares two models by
    them scores the same tables with both.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        row_tokens: tokens per packed row while scoring.
        max_tokens: longest answer, its end token counted.
        seed: of the answers.
        batch: most answers that are sampled side by side.
        end_ids: more tokens that end an answer (``AnswerPrompts``).
        scores_answers: whether the model tells the log-prob of each answer it gives, summed over its tokens.
        continues: see ``AnswerPrompts``.
        most: the largest of a number on all ranks, of a model that they hold together.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        *,
        row_tokens: int,
        max_tokens: int,
        seed: int,
        batch: int,
        end_ids: Sequence[int],
        scores_answers: bool,
        continues: bool,
        most: Callable[[float], float],
    ) -> None:
        self._score = ScoreTable(policy, row_tokens, most=most)
        self._answer = AnswerPrompts(
            policy,
            tokenizer,
            max_tokens=max_tokens,
            seed=seed,
            batch=batch,
            end_ids=end_ids,
            continues=continues,
            most=most,
        )
        self._scores_answers = scores_answers

    def __call__(self, table: pa.Table) -> pa.Table:
        if "temperature" not in table.column_names:
            return self._score(table)
        answers = self._answer(table)
        if not self._scores_answers:
            return answers
        scores = self._score(answer_pairs(answers, table["prompt_ids"]))
        answers = answers.append_column("logps", pa.array(list_sums(scores["chosen_logps"])))
        first = " ".join(str(answers[name][0]) for name in ("pair_id", "temperature", "index"))
        return answers.append_column("scored_with", pa.array([first] * len(answers)))
