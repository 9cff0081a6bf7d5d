"""The reference's log-probs: once for every pair, never again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data import work
from dpo_train.data.known import KEYS_FILE
from dpo_train.data.pairs import SPLITS
from dpo_train.data.shards import Split
from dpo_train.progress import ENVIRONMENT_KEY, Follower
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess, TableFunction
from dpo_train.stages.score_reference import unit_rows
from tests.tiny import CHAT_TEMPLATE, tiny_config

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


def same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> bool:
    """To rounding: other rows, the same pairs."""
    return found.keys() == wanted.keys() and all(
        np.allclose(values, wanted[pair_id], rtol=1e-5, atol=1e-5) for pair_id, values in found.items()
    )


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the stage has said since the last call."""
    follower = Follower(tmp_path / "events")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events"))
    return lambda: [event["text"] for event in follower.new() if event["kind"] == "message"]


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


@pytest.mark.parametrize("damage", [lambda whole: whole[:-30], lambda whole: bytes(len(whole)), lambda whole: b""])
def test_unit_that_cannot_be_read_is_done_again(
    config: RunConfig,
    pairs: Artifact,
    tmp_path: Path,
    notes: Callable[[], list[str]],
    damage: Callable[[bytes], bytes],
) -> None:
    """A disk that was pulled: of three finished units one is no Parquet file. It is named, and 200 - 32 are scored."""
    with pytest.raises(KeyboardInterrupt):
        score_reference(config, pairs, Counting(stop_after=3))
    (units,) = Path(config.store).glob("score_reference/*/units")
    file = sorted(units.glob("*.parquet"))[1]
    file.write_bytes(damage(file.read_bytes()))
    again = Counting()
    made = score_reference(config, pairs, again)
    assert again.pairs == 200 - 32
    assert any(file.name in note for note in notes())
    assert scores(made) == scores(score_reference(replace(config, store=str(tmp_path / "other")), pairs, LOCAL))


def test_finished_units_count_whatever_else_is_known_by_now(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """After five units another output of the reference, of half the records, is completed: no pair is scored twice."""
    with pytest.raises(KeyboardInterrupt):
        score_reference(config, pairs, Counting(stop_after=5))
    (units,) = Path(config.store).glob("score_reference/*/units")
    done = {key for file in units.glob("*.parquet") for key in pq.read_table(file)["pair_id"].to_pylist()}
    half = tmp_path / "half.jsonl"
    half.write_text("".join(Path(config.prepare.path or "").read_text().splitlines(keepends=True)[::2]))
    smaller = replace(config, prepare=replace(config.prepare, path=str(half)))
    other = score_reference(smaller, prepare(smaller, LOCAL), LOCAL)
    known = {key for split in SPLITS for key in Split(other, split).table(["pair_id"])["pair_id"].to_pylist()}
    assert (len(done), len(known)) == (80, 100)
    again = Counting()
    made = score_reference(config, pairs, again)
    assert again.pairs == 200 - len(done | known) == made.record.counts["newly_scored"]
    elsewhere = score_reference(replace(config, store=str(tmp_path / "other")), pairs, LOCAL)
    assert same(scores(made), scores(elsewhere))


def test_a_unit_is_the_same_whatever_else_is_done() -> None:
    """Rows in units of two: (4 1) (3 0) (2); with 3 done, what is left of its unit goes together with nothing."""
    ordered = np.array([4, 1, 3, 0, 2])

    def left(*done: int) -> list[list[int]]:
        missing = np.ones(5, np.bool_)
        missing[list(done)] = False
        return [rows.tolist() for rows in unit_rows(ordered, missing, 2)]

    assert left() == [[4, 1], [3, 0], [2]]
    assert left(3) == [[4, 1], [2], [0]]
    assert left(4, 1) == [[3, 0], [2]]
    assert left(4, 3) == [[2], [1, 0]]
    assert left(0, 1, 2, 3, 4) == []


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
    assert same(grown, afresh)


def test_scores_are_of_tokens_and_not_of_texts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template writes today's date. One record is appended the day after: all 201 prompts are others than before."""
    from transformers.utils import chat_template_utils

    def on(day: int) -> Artifact:
        class Today(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Today:
                return cls(2026, 1, day, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Today)
        return prepare(dated, LOCAL)

    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %m %Y') }}\n" + CHAT_TEMPLATE)
    dated = replace(config, prepare=replace(config.prepare, chat_template=str(template)))
    first = on(1)
    before = score_reference(dated, first, LOCAL)
    append(dated, 1)
    second = on(2)
    counting = Counting()
    made = score_reference(dated, second, counting)
    assert made.record.details["reference"] == before.record.details["reference"]
    assert scores(before).keys() < scores(made).keys()
    assert counting.pairs == 201
    assert same(scores(made), scores(score_reference(replace(dated, store=str(tmp_path / "other")), second, LOCAL)))


def test_pairs_of_the_same_tokens_share_their_score(config: RunConfig, tmp_path: Path) -> None:
    """A template trims: with a blank after the first prompt, two pairs have other ids and the same tokens."""
    template = tmp_path / "trimmed.jinja"
    template.write_text(CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim"))
    config = replace(config, prepare=replace(config.prepare, chat_template=str(template)))
    file = Path(config.prepare.path or "")
    record = json.loads(file.read_text().splitlines()[0])
    record["prompt"][0]["content"] += " "
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    made = score_reference(config, prepare(config, LOCAL), LOCAL)
    assert (made.record.counts["pairs"], made.record.counts["newly_scored"]) == (201, 200)
    found = scores(made)
    assert len(found) == 201
    assert len({tuple(values) for values in found.values()}) == 200


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("train-00000.parquet", None, marks=pytest.mark.slow),
        pytest.param("train-00000.parquet", lambda whole: whole[:-30], marks=pytest.mark.slow),
        pytest.param("train-00000.parquet", lambda whole: bytes(len(whole)), marks=pytest.mark.slow),
        ("train-00000.parquet", lambda whole: whole[:4] + bytes(len(whole) // 2 - 4) + whole[len(whole) // 2 :]),
        (KEYS_FILE, None),
        pytest.param(KEYS_FILE, lambda whole: bytes(len(whole)), marks=pytest.mark.slow),
        ("record.json", lambda whole: whole[:50]),
    ],
)
def test_damaged_earlier_output_is_as_good_as_none(
    config: RunConfig,
    pairs: Artifact,
    tmp_path: Path,
    notes: Callable[[], list[str]],
    name: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    """A file is missing, cut, or of the right size and full of zeros: what it held is scored anew, and it is named."""
    before = score_reference(config, pairs, LOCAL)
    lost = Split(pairs, "train").num_pairs if name.startswith("train") else 200
    file = before.path / name
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    append(config, 30)
    more = prepare(config, LOCAL)
    notes()
    counting = Counting()
    made = score_reference(config, more, counting)
    assert counting.pairs == lost + 30
    said = notes()
    assert any(name in note and str(before.path) in note for note in said), said
    assert same(scores(made), scores(score_reference(replace(config, store=str(tmp_path / "other")), more, LOCAL)))


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
