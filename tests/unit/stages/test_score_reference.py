"""The reference's log-probs: once for every pair, never again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data import work
from dpo_train.data.pairs import SPLITS
from dpo_train.data.shards import Split
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess, TableFunction
from tests.tiny import tiny_config

LOCAL = InProcess()


class Counting(InProcess):
    """Counts the pairs that workers are asked to score; dies after so many tasks."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.pairs = 0
        self._left = stop_after

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        for result in super().map_tables(make, tables, uses_model=uses_model):
            self.pairs += sum(result["pairs"].to_pylist())
            yield result
            if self._left is not None:
                self._left -= 1
                if not self._left:
                    raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, prepare__max_train_pairs=None)


@pytest.fixture
def pairs(config: RunConfig) -> Artifact:
    return prepare(config, LOCAL)


def scores(scored: Artifact) -> dict[str, list[float]]:
    """Log-probs of both answers by pair."""
    names = ("pair_id", "reference_chosen_logps", "reference_rejected_logps")
    rows = [row for split in SPLITS for row in Split(scored, split).table(names).to_pylist()]
    return {row["pair_id"]: row["reference_chosen_logps"] + row["reference_rejected_logps"] for row in rows}


def append(config: RunConfig, count: int) -> None:
    """New records at the end of the data, of other lengths than the old ones."""
    with Path(config.prepare.path or "").open("a") as stream:
        for i in range(count):
            record = {"prompt": f"new question {i} about the sea", "chosen": "kind and warm", "rejected": "rude"}
            stream.write(json.dumps({**record, "conversation": f"new {i}"}) + "\n")


def test_interrupted_scoring_does_only_what_is_left(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """200 pairs in units of 16: after five units 80 are done, the second try scores the other 120, to the same bits."""
    first, second, whole = Counting(stop_after=5), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        score_reference(config, pairs, first)
    made = score_reference(config, pairs, second)
    elsewhere = score_reference(replace(config, store=str(tmp_path / "other")), pairs, whole)
    assert (first.pairs, second.pairs, whole.pairs) == (80, 120, 200)
    assert made.record.counts["newly_scored"] == 120
    assert scores(made) == scores(elsewhere)
    assert not (made.path / "units").exists()


def test_half_written_unit_is_done_again(config: RunConfig, pairs: Artifact) -> None:
    """A worker killed while it writes leaves a temporary file, which is none of the unit's name."""
    with pytest.raises(KeyboardInterrupt):
        score_reference(config, pairs, Counting(stop_after=2))
    (units,) = Path(config.store).glob("score_reference/*/units")
    file = sorted(units.glob("*.parquet"))[0]
    file.rename(units / f".{file.name}.host.1")
    again = Counting()
    score_reference(config, pairs, again)
    assert again.pairs == 200 - 16


def test_appended_data_score_only_new_pairs(config: RunConfig, pairs: Artifact) -> None:
    """Thirty new records: thirty pairs are scored; the old ones' log-probs are taken over bit for bit."""
    before = score_reference(config, pairs, LOCAL)
    append(config, 30)
    counting = Counting()
    after = score_reference(config, prepare(config, LOCAL), counting)
    assert counting.pairs == 30 == after.record.counts["newly_scored"]
    assert after.record.counts["pairs"] == 230
    old, new = scores(before), scores(after)
    assert {pair_id: new[pair_id] for pair_id in old} == old
    assert after.record.details["reference"] == before.record.details["reference"]


def test_appended_scores_are_what_scoring_everything_gives(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """To rounding: other rows, the same pairs."""
    score_reference(config, pairs, LOCAL)
    append(config, 30)
    more = prepare(config, LOCAL)
    grown = scores(score_reference(config, more, LOCAL))
    afresh = scores(score_reference(replace(config, store=str(tmp_path / "other")), more, LOCAL))
    assert grown.keys() == afresh.keys()
    for pair_id, values in grown.items():
        assert np.allclose(values, afresh[pair_id], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("score", {"row_tokens": 300}),
        ("prepare", {"answer_truncation": "keep_end"}),
        ("prepare", {"template": "plain"}),
    ],
)
def test_another_reference_scores_everything(
    config: RunConfig, pairs: Artifact, section: str, changes: dict[str, Any]
) -> None:
    """Layout, truncation and template are part of what a score is; nothing of another reference is taken over."""
    score_reference(config, pairs, LOCAL)
    other = replace(config, **{section: replace(getattr(config, section), **changes)})
    counting = Counting()
    score_reference(other, prepare(other, LOCAL), counting)
    assert counting.pairs == 200


def test_adapters_of_any_shape_share_the_base_scores(config: RunConfig, pairs: Artifact) -> None:
    """With LoRA the base is scored once for all ranks, losses and rates."""
    score_reference(config, pairs, LOCAL)
    assert config.train.lora is not None
    train = replace(config.train, lora=replace(config.train.lora, rank=8), beta=0.5, loss="ipo", learning_rate=1e-5)
    assert score_reference(replace(config, train=train), pairs, LOCAL).reused


def test_shards_keep_their_pairs_and_order(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many buckets: every shard has the pairs of the shard that it was made from, each with a log-prob per token."""
    monkeypatch.setattr(work, "BUCKET_BYTES", 20_000)
    pairs = prepare(config, LOCAL)
    scored = score_reference(config, pairs, LOCAL)
    assert len(Split(pairs, "train").shards) > 2
    for split in SPLITS:
        before, after = Split(pairs, split), Split(scored, split)
        assert [(s.file, s.rows) for s in before.shards] == [(s.file, s.rows) for s in after.shards]
        assert before.table(["pair_id"]) == after.table(["pair_id"])
        for row in after.table().to_pylist():
            for side in ("chosen", "rejected"):
                assert len(row[f"reference_{side}_logps"]) == len(row[f"{side}_ids"])
