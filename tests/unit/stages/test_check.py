"""What must fit before a model is loaded, each with the words a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_train.errors import ConfigError, DataError, ModelError
from dpo_train.stages.check import check_model_reads, check_reference, check_rows


def _pairs(**columns: Any) -> pa.Table:
    """Two pairs of 2 + 1 + 3 and 4 + 2 + 1 tokens."""
    table = {
        "pair_id": ["a", "b"],
        "prompt_ids": [[1, 2], [3, 4, 5, 6]],
        "chosen_ids": [[7], [8, 9]],
        "rejected_ids": [[1, 2, 3], [4]],
        "reference_chosen_logps": [[-1.0], [-1.0, -2.0]],
        "reference_rejected_logps": [[-1.0, -2.0, -3.0], [-4.0]],
    }
    return pa.table({**table, **columns})


def _model(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_fits_passes(tmp_path: Path) -> None:
    """The longest pair fills its row exactly, the largest id is the vocabulary's last, six positions are six."""
    check_rows(_pairs(), 7, "train.row_tokens")
    check_model_reads(_pairs(), _model(tmp_path, vocab_size=10, max_position_embeddings=6))
    check_model_reads(_pairs(), _model(tmp_path, text_config={"vocab_size": 10}))
    check_reference(_pairs(), tmp_path)
    check_rows(_pairs().slice(0, 0), 1, "train.row_tokens")
    check_model_reads(_pairs().slice(0, 0), tmp_path)


@pytest.mark.parametrize(
    ("check", "kind", "words"),
    [
        (
            lambda _: check_rows(_pairs(), 6, "train.row_tokens"),
            ConfigError,
            r"pair b with 7 tokens .* train\.row_tokens=6\. What to do: set train\.row_tokens to 7 or more",
        ),
        (
            lambda folder: check_model_reads(_pairs(), _model(folder, vocab_size=9)),
            ModelError,
            "tokenizer .* does not match its model.* token id 9, where the model's vocabulary has 9",
        ),
        (
            lambda folder: check_model_reads(_pairs(), _model(folder, n_positions=5)),
            ModelError,
            "longer than the model .* Got: 6 tokens. Expected: at most 5",
        ),
        (
            lambda folder: check_model_reads(
                _pairs(),
                _model(
                    folder,
                    max_position_embeddings=99,
                    rope_scaling={"type": "longrope"},
                    original_max_position_embeddings=5,
                ),
            ),
            ModelError,
            "Got: 6 tokens. Expected: at most 5",
        ),
        (
            lambda folder: check_reference(_pairs(reference_chosen_logps=[[-1.0], None]), folder),
            DataError,
            "misses pairs. Got: 1 of 2 without one for each token of the chosen answer, the first of them b",
        ),
        (
            lambda folder: check_reference(_pairs(reference_rejected_logps=[[-1.0], [-4.0]]), folder),
            DataError,
            "1 of 2 .* rejected answer, the first of them a",
        ),
        (
            lambda folder: check_reference(_pairs().drop_columns(["reference_chosen_logps"]), folder),
            DataError,
            "holds no reference log-probs",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, check: Callable[[Path], None], kind: type[Exception], words: str
) -> None:
    """The pair or the number, the option, and what to do."""
    with pytest.raises(kind, match=words):
        check(tmp_path)
