"""What a sweep learns of a trial: from validation pairs and prompts, with a real policy and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact, Output
from dpo_train.config import FunctionJudge, RunConfig, SelectConfig
from dpo_train.data.shards import Split, list_sums
from dpo_train.errors import ConfigError
from dpo_train.evaluate.statistics import wilson
from dpo_train.evaluate.trials import NUMBERS, Point, Trial
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess, TableFunction
from dpo_train.stages.measure_trial import accuracy_of, check_measurable, deviations, measure_trial
from dpo_train.train.job import RankJob
from dpo_train.train.map_job import MapJob
from tests.tiny import tiny_config

LOCAL = InProcess()

Made = tuple[RunConfig, Artifact, Artifact]


class Counting(InProcess):
    """Counts the pools of workers that are asked for, with and without a model."""

    def __init__(self) -> None:
        self.models = self.others = 0

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        self.models += uses_model
        self.others += not uses_model
        return super().map_tables(make, tables, uses_model=uses_model)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """16 validation pairs of 8 conversations, and a policy that has learned from others."""
    root = tmp_path_factory.mktemp("measure")
    config = tiny_config(root, sweep__num_prompts=6)
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    return config, scored, train(config, scored, LOCAL)


def measured(
    config: RunConfig, scored: Artifact, policy: Artifact, folder: Path, executor: InProcess = LOCAL, **fields: Any
) -> Trial:
    folder.mkdir(exist_ok=True)
    about = {"name": "beta=0.1", "parameters": {"beta": 0.1}, "seed": 0, **fields}
    out = Output(str(folder))
    return measure_trial(config, scored, policy, executor=executor, out=out, reporter=Reporter(), **about)


def select_by(config: RunConfig, metric: str, function: str) -> RunConfig:
    return replace(
        config,
        sweep=replace(config.sweep, select=replace(config.sweep.select, metric=metric)),
        evaluate=replace(config.evaluate, judge=FunctionJudge(kind="function", function=function)),
    )


def test_deviations_of_groups() -> None:
    """Groups of 2, 1 and 1 values: 1 + 1, 0, nothing. The mean over 3 is 2/3: (2 - 4/3) / 3, (0 - 2/3) / 3, 0."""
    found = deviations(np.array([1.0, 0.0, 1.0, np.nan]), np.array([0, 1, 0, 2]))

    assert found == (0.222222, -0.222222, 0.0)


def test_validation_pairs_are_measured_and_no_held_out_one(made: Made, tmp_path: Path) -> None:
    """Accuracy and margin are the training's own at its end; the margin is in units of the trial's beta."""
    config, scored, policy = made
    trial = measured(config, scored, policy, tmp_path)

    num_pairs = Split(scored, "validation").num_pairs
    assert trial.accuracy is not None
    assert trial.margin is not None
    assert trial.accuracy.n == trial.margin.n == num_pairs
    assert trial.accuracy.value == pytest.approx(policy.record.metrics["validation/rewards/accuracy"], abs=1e-6)
    assert trial.margin.value == pytest.approx(policy.record.metrics["validation/rewards/margin"], rel=1e-4)
    assert trial.margin.low < trial.margin.value < trial.margin.high
    groups = set(Split(scored, "validation").table(["group"])["group"].to_pylist())
    assert len(trial.deviations["accuracy"]) == len(groups)
    assert sum(trial.deviations["accuracy"]) == pytest.approx(0, abs=1e-5)
    asked = {name for file in tmp_path.rglob("*.parquet") for name in pq.read_table(file)["pair_id"].to_pylist()}
    assert asked == set(Split(scored, "validation").table(["pair_id"])["pair_id"].to_pylist())


def test_points_follow_the_training_to_its_end(made: Made, tmp_path: Path) -> None:
    """Measured by the training after steps 10 and 20, the latter here with its KL."""
    config, scored, policy = made
    trial = measured(config, scored, policy, tmp_path)

    (first,) = [line for line in read_history(policy.file(METRICS_FILE)) if line["step"] == 9]
    assert trial.steps == 20
    assert [point.step for point in trial.points] == [10, 20]
    assert trial.points[0].accuracy is not None
    assert trial.points[0].accuracy.value == pytest.approx(first["validation/rewards/accuracy"])
    assert trial.points[0].kl is None
    numbers = {name: getattr(trial, name) for name in NUMBERS}
    assert trial.points[1] == Point(step=20, **numbers, deviations={"kl": trial.deviations["kl"]})


def test_kl_is_the_mean_log_ratio_of_the_policys_own_answers(made: Made, tmp_path: Path) -> None:
    """Over 6 prompts, from both models' log-probs of the very answers; a trained policy is away from its reference."""
    config, scored, policy = made
    trial = measured(config, scored, policy, tmp_path)

    answers = pq.read_table(tmp_path / "work" / policy.record.digest / "work" / "policy-answers.parquet")
    reference = pq.read_table(tmp_path / "work" / policy.record.digest / "work" / "reference-scores.parquet")
    sums = dict(zip(reference["pair_id"].to_pylist(), list_sums(reference["chosen_logps"]), strict=True))
    ratios = [row["logps"] - sums[row["pair_id"]] for row in answers.to_pylist()]
    assert trial.kl is not None
    assert trial.length_ratio is not None
    assert len(ratios) == trial.kl.n == trial.length_ratio.n == 6
    assert trial.kl.value == pytest.approx(float(np.mean(ratios)))
    assert trial.kl.value > 0.1


def test_policy_that_is_its_reference_is_where_it_started(made: Made, tmp_path: Path) -> None:
    """One step at next to no learning rate: KL 0, equal lengths, half of the pairs right by ties."""
    config, scored, _ = made
    same = replace(config, train=replace(config.train, learning_rate=1e-30, max_steps=1))

    trial = measured(config, scored, train(same, scored, LOCAL), tmp_path)

    assert trial.kl is not None
    assert trial.length_ratio is not None
    assert trial.kl.value == pytest.approx(0, abs=1e-5)
    assert trial.length_ratio.value == 1


def test_reference_answers_once_for_all_trials(made: Made, tmp_path: Path) -> None:
    """3 pools for the first trial: policy, reference's answers, reference's word on the policy's answers. The second
    trial needs no new answers of the reference, and the first one measured again needs nothing at all."""
    config, scored, policy = made
    other = train(replace(config, train=replace(config.train, beta=0.5)), scored, LOCAL)
    first, second, again = Counting(), Counting(), Counting()

    found = measured(config, scored, policy, tmp_path, first)
    measured(config, scored, other, tmp_path, second)

    assert measured(config, scored, policy, tmp_path, again) == found
    assert (first.models, second.models, again.models) == (3, 2, 0)


def test_without_prompts_there_are_pairs_alone(made: Made, tmp_path: Path) -> None:
    """Nobody is asked for answers."""
    config, scored, policy = made
    counting = Counting()

    trial = measured(replace(config, sweep=replace(config.sweep, num_prompts=0)), scored, policy, tmp_path, counting)

    assert trial.accuracy is not None
    assert (trial.kl, trial.length_ratio, counting.models) == (None, None, 1)


def test_reward_is_the_judges_mean_over_prompts(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that rewards characters: the mean length of the answers' texts. The reference's rewards are asked for
    once, and the deviations are those of prompts."""
    (tmp_path / "count_judge.py").write_text("def reward(prompt, answer):\n    return len(answer)\n")
    monkeypatch.chdir(tmp_path)
    config, scored, policy = made
    config = select_by(config, "reward", "count_judge:reward")
    first, again = Counting(), Counting()

    trial = measured(config, scored, policy, tmp_path / "out", first)
    measured(config, scored, policy, tmp_path / "out", again)

    answers = pq.read_table(tmp_path / "out" / "work" / policy.record.digest / "work" / "policy-answers.parquet")
    theirs = pq.read_table(tmp_path / "out" / "work" / "reference-answers.parquet")
    mine, others = ({row["pair_id"]: len(row["answer"]) for row in table.to_pylist()} for table in (answers, theirs))
    assert trial.reward is not None
    assert trial.win_rate is not None
    assert trial.reward.value == pytest.approx(np.mean(list(mine.values())))
    wins = [(mine[each] > others[each]) + 0.5 * (mine[each] == others[each]) for each in mine]
    assert trial.win_rate.value == pytest.approx(np.mean(wins))
    assert {name: len(found) for name, found in trial.deviations.items()} == {
        "accuracy": 8, "kl": 6, "win_rate": 6, "reward": 6
    }  # fmt: skip
    assert (first.others, again.others) == (2, 1)


def test_win_rate_is_against_the_references_answers(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy of other answers, by a judge to whom every answer is worth the same: 6 ties, half of them won."""
    (tmp_path / "same_judge.py").write_text("def reward(prompt, answer):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    config, scored, policy = made

    trial = measured(select_by(config, "win_rate", "same_judge:reward"), scored, policy, tmp_path / "out")

    assert trial.win_rate is not None
    assert (trial.win_rate.value, trial.win_rate.n) == (0.5, 6)
    assert trial.deviations["win_rate"] == (0.0,) * 6


def test_judge_with_nothing_to_say_fails_the_trial_not_the_sweep(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN for every answer."""
    (tmp_path / "mute_judge.py").write_text("def reward(prompt, answer):\n    return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    config, scored, policy = made

    trial = measured(select_by(config, "reward", "mute_judge:reward"), scored, policy, tmp_path / "out")

    assert trial.failure == "its reward cannot be used: the judge rewards none of the answers with a number"


def test_policy_whose_log_probs_are_no_numbers_is_a_failed_trial(made: Made, tmp_path: Path) -> None:
    """What was kept of the policy has a NaN in one pair: the reason counts it."""
    config, scored, policy = made
    measured(config, scored, policy, tmp_path)
    kept = tmp_path / "work" / policy.record.digest / "work" / "policy-scores.parquet"
    table = pq.read_table(kept)
    values = table["chosen_logps"].to_pylist()
    values[3] = [float("nan")] * len(values[3])
    place = table.column_names.index("chosen_logps")
    pq.write_table(
        table.set_column(place, "chosen_logps", pa.array(values, table.schema.field("chosen_logps").type)), kept
    )

    trial = measured(config, scored, policy, tmp_path)

    num_pairs = Split(scored, "validation").num_pairs
    assert trial.failure == f"log-probs of 1 of {num_pairs} validation pairs are not finite"
    assert trial.accuracy is None


def test_accuracy_on_the_way_counts_groups_not_pairs() -> None:
    """16 pairs of 8 conversations say as much as 8: 0.75 by Wilson's interval over 8."""
    found = accuracy_of(0.75, np.array([2] * 8))

    assert found == wilson(12, 8, n=16)
    assert found.n == 16


def test_trials_side_by_side_share_no_folder_of_parts(made: Made, tmp_path: Path) -> None:
    """Ranks that hold a model together leave results in files: two trials name no file in common but those of the
    reference's answers, which one of them asks for while the other waits."""
    config, scored, policy = made
    other = train(replace(config, train=replace(config.train, beta=0.5)), scored, LOCAL)
    sharded = replace(config, compute=replace(config.compute, score_sharded=True))

    class Noting(InProcess):
        def __init__(self) -> None:
            self.folders: set[tuple[str, str]] = set()

        def run_ranks(self, job: RankJob) -> None:
            assert isinstance(job, MapJob)
            self.folders.add((job.output, job.folder))
            super().run_ranks(job)

    first, second = Noting(), Noting()
    for noting, trained in ((first, policy), (second, other)):
        measured(sharded, scored, trained, tmp_path, noting)

    assert len(first.folders) == 4
    assert len(second.folders) == 3
    assert first.folders & second.folders == set()


def test_what_cannot_be_measured_is_refused_before_anything_is(made: Made) -> None:
    """An answer that may not fit a row, pairs that do not, and a KL of one prompt."""
    config, scored, _ = made
    longer = replace(config, evaluate=replace(config.evaluate, max_sample_tokens=250))
    shorter = replace(config, evaluate=replace(config.evaluate, row_tokens=16))
    alone = replace(config, sweep=replace(config.sweep, num_prompts=1, select=SelectConfig(max_kl=1.0)))

    for wrong, message in (
        (longer, r"evaluate.row_tokens to \d+"), (shorter, "evaluate.row_tokens"), (alone, "raise sweep.num_prompts"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_measurable(wrong, scored)
    check_measurable(config, scored)
