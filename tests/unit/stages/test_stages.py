"""Stages in this process: records, reuse and identity."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data.pairs import PAIR_SCHEMA, SCORED_SCHEMA, SPLITS
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, DataError, ModelError, NonFiniteLossError, StoreError
from dpo_train.progress import Reporter
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.train.job import RankJob
from tests.tiny import tiny_config, tiny_model

LOCAL = InProcess()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> Artifact:
    return prepare(config, LOCAL)


@pytest.fixture(scope="module")
def scored(config: RunConfig, pairs: Artifact) -> Artifact:
    return score_reference(config, pairs, LOCAL)


@pytest.fixture(scope="module")
def policy(config: RunConfig, scored: Artifact) -> Artifact:
    return train(config, scored, LOCAL)


def with_(config: RunConfig, section: str, **changes: object) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def test_prepare_accounts_for_every_record(config: RunConfig, tmp_path: Path) -> None:
    """Of 204 records 3 are broken and 1 stands twice: records = used + rejected, each with its line and reason."""
    data = tmp_path / "pairs.jsonl"
    lines = Path(config.prepare.path).read_text().splitlines()
    broken = ["{not json", json.dumps({"prompt": "a"}), json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})]
    data.write_text("\n".join([*broken, lines[0], *lines]) + "\n")
    changed = with_(replace(config, store=str(tmp_path / "store")), "prepare", path=str(data), group_key=None)

    made = prepare(changed, LOCAL)

    counts = made.record.counts
    assert counts["records"] == 204 == counts["used"] + counts["rejected"]
    assert counts["used"] == 200 == sum(counts[f"pairs/{split}"] for split in SPLITS)
    rejections = [json.loads(line) for line in (made.path / "rejections.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejections] == [
        (1, "undecodable"),
        (2, "missing_field"),
        (3, "identical_answers"),
        (5, "duplicate"),
    ]
    assert rejections[3]["detail"] == "of pairs.jsonl line 4"
    assert Split(made, "train").table().schema.equals(PAIR_SCHEMA)


def test_no_group_is_in_two_splits(pairs: Artifact) -> None:
    """A conversation stays whole."""
    groups = [set(Split(pairs, split).table()["group"].to_pylist()) for split in SPLITS]

    assert all(groups)
    assert groups[0] & groups[1] == groups[0] & groups[2] == groups[1] & groups[2] == set()


def test_scores_stand_beside_their_pair(scored: Artifact, pairs: Artifact) -> None:
    """As many log-probs as answer tokens, all negative, in the order of the pairs."""
    for split in SPLITS:
        table = Split(scored, split).table()
        assert table.schema.equals(SCORED_SCHEMA)
        assert table["pair_id"].to_pylist() == Split(pairs, split).table()["pair_id"].to_pylist()
        for row in table.to_pylist():
            for side in ("chosen", "rejected"):
                assert len(row[f"reference_{side}_logps"]) == len(row[f"{side}_ids"])
                assert max(row[f"reference_{side}_logps"]) < 0


def test_rerun_is_reused_and_other_settings_are_not(
    config: RunConfig, pairs: Artifact, scored: Artifact, policy: Artifact
) -> None:
    """Address = identity: the same config gives the same complete output; what changes content gives another."""
    assert prepare(config, LOCAL).reused
    assert score_reference(config, pairs, LOCAL).reused
    again = train(config, scored, LOCAL)
    assert again.reused
    assert again.record == policy.record
    other = train(with_(config, "train", max_steps=1), scored, LOCAL)
    assert not other.reused
    assert other.path != policy.path


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("compute", {"workers": 7, "data_workers": 3, "executor": "ray"}),
        ("tracking", {"experiment": "other"}),
        ("train", {"checkpoint_steps": 1}),
    ],
)
def test_where_and_how_often_is_no_part_of_the_identity(
    config: RunConfig, scored: Artifact, policy: Artifact, section: str, changes: dict[str, object]
) -> None:
    """Workers, tracking and the cadence of checkpoints change no result."""
    assert train(with_(config, section, **changes), scored, LOCAL).path == policy.path


def test_training_killed_before_its_record_trains_nothing_again(
    config: RunConfig, scored: Artifact, tmp_path: Path
) -> None:
    """All steps done, the policy saved, then killed: the checkpoint of the last step is still there to go on from."""

    class Killed(InProcess):
        def run_ranks(self, job: RankJob) -> None:
            super().run_ranks(job)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, scored, Killed(), output=tmp_path / "out")
    events = Reporter(str(tmp_path / "events.jsonl"))

    made = train(config, scored, LOCAL, output=tmp_path / "out", reporter=events)

    assert made.record.counts["steps"] == 20
    assert not (tmp_path / "events.jsonl").exists()
    assert not (made.path / "checkpoints").exists()


def test_moved_data_and_model_are_still_the_same(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """Identity comes from content: the same file elsewhere gives the same digest."""
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(config.prepare.path).read_bytes())

    assert prepare(with_(config, "prepare", path=str(moved)), LOCAL).record.digest == pairs.record.digest


def test_policy_is_not_judged_on_pairs_of_another_split(config: RunConfig, policy: Artifact, tmp_path: Path) -> None:
    """Pairs split with another seed may hold what the policy was trained on."""
    other = replace(config, store=str(tmp_path), seed=99)
    scored = score_reference(other, prepare(other, LOCAL), LOCAL)

    with pytest.raises(StoreError, match="was not made from"):
        evaluate(other, scored, policy, LOCAL)


def test_policy_without_weights_is_not_taken_for_the_base(config: RunConfig, scored: Artifact, tmp_path: Path) -> None:
    """A sweep's trial keeps no weights; evaluating it must not measure the base model."""
    made = train(with_(config, "train", max_steps=1), scored, LOCAL, output=tmp_path / "trial")
    shutil.rmtree(made.path / "adapter")

    with pytest.raises(ModelError, match="no trained weights"):
        evaluate(config, scored, made, LOCAL)


def test_full_training_starts_as_its_reference_and_learns(config: RunConfig, scored: Artifact) -> None:
    """Without adapters all weights are trained, a model folder is written, and its evaluation loads that folder."""
    full = with_(config, "train", lora=None, learning_rate=1e-3)

    made = train(full, scored, LOCAL)

    assert (made.path / "model" / "model.safetensors").is_file()
    assert made.record.metrics["first_loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert made.record.counts["validation_pairs"] == Split(scored, "validation").num_pairs > 0
    assert evaluate(full, scored, made, LOCAL).record.details["learned"] is True


def test_pairs_of_few_groups_are_not_judged(config: RunConfig, policy: Artifact, tmp_path: Path) -> None:
    """Sixty right of a hundred from one conversation are no evidence."""
    few = with_(config, "evaluate", min_heldout_pairs=2)
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    table = Split(scored, "heldout").table()
    one_group = table.set_column(table.column_names.index("group"), "group", pa.array(["same"] * len(table)))
    shutil.copytree(scored.path, tmp_path / "scored")
    pq.write_table(one_group, tmp_path / "scored" / "heldout-00000.parquet")

    changed = replace(scored, home=str(tmp_path / "scored"), record=replace(scored.record, files={}))
    with pytest.raises(DataError, match="too few groups"):
        evaluate(few, changed, policy, LOCAL)


def test_diverging_training_names_its_step_and_is_not_complete(config: RunConfig, scored: Artifact) -> None:
    """A loss that overflows stops with the step and the pairs."""
    with pytest.raises(NonFiniteLossError, match="step"):
        train(with_(config, "train", beta=1e38), scored, LOCAL)


def test_evaluation_measures_heldout_pairs_only(config: RunConfig, scored: Artifact, policy: Artifact) -> None:
    """The report rests on the held-out pairs, and their margins are kept by pair."""
    made = evaluate(config, scored, policy, LOCAL)

    heldout = Split(scored, "heldout").table()
    margins = pq.read_table(made.path / "margins.parquet")
    assert margins["pair_id"].to_pylist() == heldout["pair_id"].to_pylist()
    report = json.loads((made.path / "report.json").read_text())
    assert report["findings"]["heldout"]["accuracy"]["n"] == len(heldout)
    assert made.record.details["learned"] is True
    assert len(report["samples"]) == 4


def test_too_few_heldout_pairs_are_not_judged(config: RunConfig, scored: Artifact, policy: Artifact) -> None:
    """n below the minimum is the user's mistake, not a pass."""
    with pytest.raises(DataError, match="Too few held-out pairs"):
        evaluate(with_(config, "evaluate", min_heldout_pairs=10_000), scored, policy, LOCAL)


def test_pair_longer_than_a_row_is_refused_before_training(config: RunConfig, scored: Artifact) -> None:
    """Scored in longer rows than it would be trained in."""
    with pytest.raises(ConfigError, match=r"longer than a row.*train\.row_tokens=8"):
        train(with_(config, "train", row_tokens=8), scored, LOCAL)


def test_reference_of_another_model_is_refused_before_training(
    config: RunConfig, scored: Artifact, tmp_path: Path
) -> None:
    """By the digest of its folder: nothing has to be computed to see it."""
    other = tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match="scored by another model"):
        train(with_(config, "model", path=str(other)), scored, LOCAL)


def test_training_that_keeps_its_best_says_which_step_it_was(config: RunConfig, scored: Artifact) -> None:
    """The record has the kept step, and its metrics are that step's."""
    made = train(with_(config, "train", keep="best", evaluate_steps=2, learning_rate=0.05), scored, LOCAL)
    history = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in history if "validation/loss" in line), key=lambda line: line["validation/loss"])
    assert made.record.details["kept_step"] == best["step"] + 1
    assert made.record.metrics["validation/loss"] == best["validation/loss"]
