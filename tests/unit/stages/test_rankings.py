"""Whole rankings from raw records through scoring to a trained policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data.pairs import SCORED_SCHEMA, SPLITS
from dpo_train.data.shards import Split, lengths
from dpo_train.errors import ConfigError, DataError, ModelError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.check import check_model_reads, check_rankings, check_reference, check_rows
from dpo_train.stages.executor import InProcess
from tests.tiny import BAD, EOS, GOOD, tiny_config

LOCAL = InProcess()
RANKINGS = {"prepare__pairing": "ranking", "train__loss": "plackett_luce", "prepare__group_key": None}


def write_nectar(path: Path, count: int = 120) -> Path:
    """Records in Nectar's shape: 3 to 5 answers, the better the more GOOD and the fewer BAD words.

    Every tenth has two answers of the same rank, every tenth an empty one, every tenth one that spells the end token;
    the last record has one answer alone.
    """
    random = Random(0)
    lines = []
    for index in range(count):
        length = random.randint(3, 5)
        answers = []
        for place in range(length):
            good, bad = random.sample(GOOD, length - 1 - place), random.sample(BAD, place)
            rank = float(place if index % 10 == 3 and place == 1 else place + 1)
            answers.append({"answer": " and ".join([*good, *bad]), "model": f"m{place}", "rank": rank})
        if index % 10 == 7:
            answers[1]["answer"] = " "
        if index % 10 == 5:
            answers[-1]["answer"] += f"{EOS} then"
        random.shuffle(answers)
        prompt = f"\n\nHuman: question {index} about the sea\n\nAssistant: "
        lines.append({"prompt": prompt, "answers": answers[:1] if index == count - 1 else answers, "source": ["web"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("rankings")
    return tiny_config(folder, prepare__path=str(write_nectar(folder / "nectar.jsonl")), **RANKINGS)


@pytest.fixture(scope="module")
def prepared(config: RunConfig) -> Artifact:
    return prepare(config, LOCAL)


@pytest.fixture(scope="module")
def scored(config: RunConfig, prepared: Artifact) -> Artifact:
    return score_reference(config, prepared, LOCAL)


def test_every_record_is_one_ranking_or_one_rejection(prepared: Artifact) -> None:
    """120 records: 119 rankings; of answers that tie, are empty or spell the end token 12 each are told, and the record
    of one answer."""
    counts = prepared.record.counts
    assert (counts["records"], counts["used"], counts["rejected"]) == (120, 119, 1)
    assert (counts["candidate_pairs"], counts["kept_pairs"], counts["rejected_pairs"]) == (156, 119, 37)
    reasons = {name: number for name, number in counts.items() if name.startswith("rejected/")}
    assert reasons == {
        **{f"rejected/{reason}": 12 for reason in ("tie", "empty_answer", "end_token_in_answer")},
        "rejected/too_few_answers": 1,
    }
    rejections = [json.loads(line) for line in (prepared.path / "rejections.jsonl").read_text().splitlines()]
    assert [(row["line"] - 1) % 10 for row in rejections if row["reason"] == "end_token_in_answer"] == [5] * 12
    assert all(row["candidate"] > 0 for row in rejections[:-1])
    assert sum(counts[f"pairs/{split}"] for split in SPLITS) == 119
    told = json.loads((prepared.path / "report.json").read_text())["lengths"]["pair"]
    tables = [Split(prepared, split).pairs() for split in SPLITS]
    wanted = [pair.num_tokens for pairs in tables for pair in pairs]
    assert told["max"] == max(wanted)
    assert told["mean"] == pytest.approx(float(np.mean(wanted)), rel=1e-3)


def test_answers_stand_in_their_order_as_texts_and_as_tokens(prepared: Artifact) -> None:
    """The number of BAD words grows from answer to answer, so the ids of no two answers are the same."""
    for row in (row for split in SPLITS for row in Split(prepared, split).table().to_pylist()):
        answers = [row["chosen"], row["rejected"], *(other["content"] for other in row["others"])]
        bad = [sum(word in BAD for word in answer.split()) for answer in answers]
        assert bad == sorted(set(bad))
        assert len(row["other_ids"]) == len(answers) - 2 <= 3
        assert len({tuple(ids) for ids in (row["chosen_ids"], row["rejected_ids"], *row["other_ids"])}) == len(answers)


def test_every_answer_is_scored_once_and_never_again(config: RunConfig, scored: Artifact, tmp_path: Path) -> None:
    """A log-prob for each token; appended records take what is there from the earlier output, to the same bits."""
    for split in SPLITS:
        table = Split(scored, split).table()
        assert table.schema.equals(SCORED_SCHEMA)
        check_reference(table, "scored")
        for pair in Split(scored, split).pairs():
            assert [len(x) for x in pair.reference_other_logps] == [len(x) for x in pair.other_ids]
            assert all((logps < 0).all() for logps in pair.reference_other_logps)
    more = tmp_path / "more.jsonl"
    new = {"prompt": "\n\nHuman: a new one\n\nAssistant: ", "source": []}
    new["answers"] = [{"answer": word, "rank": rank} for rank, word in enumerate(("fair", "dull", "grim"), 1)]
    more.write_text(Path(config.prepare.path or "").read_text() + json.dumps(new) + "\n")
    longer = replace(config, prepare=replace(config.prepare, path=str(more)))
    again = score_reference(longer, prepare(longer, LOCAL), LOCAL)
    assert again.record.counts["newly_scored"] == 1
    assert again.record.counts["pairs"] == 120
    known = {pair.pair_id: pair for split in SPLITS for pair in Split(again, split).pairs()}
    for pair in (pair for split in SPLITS for pair in Split(scored, split).pairs()):
        for logps, other in zip(pair.reference_other_logps, known[pair.pair_id].reference_other_logps, strict=True):
            assert np.array_equal(logps, other)


def test_policy_learns_the_whole_order(config: RunConfig, scored: Artifact) -> None:
    """The first loss is the mean of ln K!; twenty steps on, unseen rankings are likelier than any order by chance."""
    policy = train(config, scored, LOCAL)
    history = read_history(policy.path / METRICS_FILE)
    validation = list(Split(scored, "validation").pairs())
    chance = float(np.mean([sum(np.log(np.arange(2, len(pair.answer_ids) + 1))) for pair in validation]))
    assert 1.5 < history[0]["loss"] < 4.0
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert policy.record.metrics["validation/loss"] < 0.7 * chance
    assert policy.record.metrics["validation/rewards/accuracy"] > 0.8


def test_evaluation_judges_the_best_against_the_second(config: RunConfig, scored: Artifact) -> None:
    """It reads no further answers: rows that hold the longest pair will do."""
    heldout = Split(scored, "heldout")
    pairs = list(heldout.pairs())
    longest = int(lengths(heldout.table(), "prompt", "chosen", "rejected").max())
    assert longest < max(pair.num_tokens for pair in pairs)
    section = replace(config.evaluate, min_heldout_pairs=10, num_prompts=0, row_tokens=longest)
    policy = train(config, scored, LOCAL)
    found = evaluate(replace(config, evaluate=section), scored, policy, LOCAL)
    assert found.record.metrics["heldout/accuracy"] > 0.8
    assert found.record.counts["heldout_pairs"] == len(pairs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "sigmoid"}, "train.loss=sigmoid sees two answers"),
        ({"loss": {"plackett_luce": 1.0, "sft": 0.1}}, r"train.loss=plackett_luce \+ sft sees two answers"),
        ({"ld_alpha": 0.5}, "train.ld_alpha compares the lengths of two answers"),
        ({"wpo": True}, "train.wpo weighs by two answers"),
    ],
)
def test_what_knows_two_answers_alone_is_refused(
    config: RunConfig, scored: Artifact, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """By the config, for a source of several too; and by the data, when they were prepared with another config."""
    overrides = {f"train__{name}": value for name, value in ({"loss": "plackett_luce"} | changes).items()}
    with pytest.raises(ConfigError, match=f"prepare.pairing=ranking: {words}"):
        tiny_config(tmp_path, prepare__pairing="ranking", **overrides)
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "pairing": "ranking"}]
    with pytest.raises(ConfigError, match=f"prepare.pairing=ranking: {words}"):
        tiny_config(tmp_path, prepare__path=None, prepare__group_key=None, prepare__sources=sources, **overrides)
    with pytest.raises(ConfigError, match=rf"more than two answers: {words}.*Got: \d+ of \d+, the first of them"):
        train(replace(config, train=replace(config.train, **changes)), scored, LOCAL)


def test_pairs_go_with_any_loss(scored: Artifact, config: RunConfig) -> None:
    """The check looks at rankings alone."""
    table = Split(scored, "train").table().drop_columns(["other_ids"])
    check_rankings(table, replace(config.train, loss="sigmoid", wpo=True))


def test_what_is_too_long_or_unscored_is_found_in_further_answers(scored: Artifact, tmp_path: Path) -> None:
    """Rows, positions, vocabulary and reference: each check sees the third answer and those behind it."""
    split = Split(scored, "train")
    table, pairs = split.table(), list(split.pairs())
    longest = max(pairs, key=lambda pair: pair.num_tokens)
    check_rows(table, longest.num_tokens, "train.row_tokens")
    with pytest.raises(ConfigError, match=f"pair {longest.pair_id} with {longest.num_tokens} tokens"):
        check_rows(table, longest.num_tokens - 1, "train.row_tokens")

    place = next(i for i, pair in enumerate(pairs) if len(pair.other_ids) > 1)
    column = table["other_ids"].to_pylist()
    column[place][-1] = [9999] * 50
    field = SCORED_SCHEMA.field("other_ids")
    longer = table.set_column(table.column_names.index(field.name), field, pa.array(column, field.type))
    positions = len(pairs[place].prompt_ids) + 50
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions, "vocab_size": 10_000}))
    check_model_reads(longer, tmp_path)
    for content, words in (
        ({"max_position_embeddings": positions - 1}, f"{positions} tokens"),
        ({"vocab_size": 9999}, "token id 9999"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=words):
            check_model_reads(longer, tmp_path)
    message = f"1 of {len(pairs)} without one for each token of the answers from the third on, the first of them "
    with pytest.raises(DataError, match=message + pairs[place].pair_id):
        check_reference(longer, "scored")
    with pytest.raises(DataError, match="the answers from the third on"):
        check_reference(table.drop_columns(["reference_other_logps"]), "scored")
