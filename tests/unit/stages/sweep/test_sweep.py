"""Sweeps in this process: what is tried, chosen, kept, removed, and what an interrupted one does again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_train.artifacts import Artifact
from dpo_train.config import LogUniform, RunConfig, SelectConfig
from dpo_train.errors import ConfigError, RunError
from dpo_train.progress import ENVIRONMENT_KEY
from dpo_train.stages import prepare, score_reference, sweep, train
from dpo_train.stages.executor import InProcess
from dpo_train.stages.sweep import chosen_config
from dpo_train.train.job import RankJob, TrainJob
from tests.unit.stages.sweep.project import (
    BETAS,
    LOCAL,
    Counting,
    elsewhere,
    policies,
    same_weights,
    trials_of,
    with_sweep,
    with_train,
)


def test_every_trial_is_recorded_and_no_weights_stay(config: RunConfig, scored: Artifact) -> None:
    """Two betas, one of which is chosen; why the other was not is in the record, and both curves are kept."""
    made = sweep(with_sweep(config, betas=(0.5, 0.1), max_steps=3), scored, LOCAL)

    details, trials = made.record.details, trials_of(made)
    assert trials.keys() == {"beta=0.1", "beta=0.5"}
    assert details["parameters"] == {"beta": details["beta"]}
    assert details["why_not"].keys() == trials.keys() - {f"beta={details['beta']:g}"}
    assert {trial["steps"] for trial in trials.values()} == {3}
    assert all(trial["kl"]["n"] == 2 for trial in trials.values())
    curves = {name for name in made.record.files if name.startswith("trials/")}
    assert curves == {"trials/beta=0.1/metrics.jsonl", "trials/beta=0.5/metrics.jsonl"}
    seconds = json.loads((made.path / "seconds.json").read_text())
    assert seconds.keys() == trials.keys()
    assert min(seconds.values()) > 0
    assert list(made.path.rglob("*.safetensors")) == []
    assert policies(config) == []
    assert not (made.path / "work").exists()


def test_what_diverges_or_lacks_memory_fails_alone(config: RunConfig, scored: Artifact) -> None:
    """A beta so large that the loss overflows, and one for which there is no memory: each with its reason."""

    class NoMemory(InProcess):
        def run_ranks(self, job: RankJob) -> None:
            if isinstance(job, TrainJob) and job.config.beta == 0.2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            super().run_ranks(job)

    made = sweep(with_sweep(config, betas=(0.1, 0.2, 1e38), max_steps=2), scored, NoMemory())

    assert made.record.counts["failed"] == 2
    assert made.record.details["beta"] == 0.1
    assert "not finite" in made.record.details["why_not"]["beta=1e+38"]
    assert "OutOfMemoryError: CUDA out of memory" in made.record.details["why_not"]["beta=0.2"]


def test_all_trials_failing_is_a_failed_stage_that_trains_nothing_twice(config: RunConfig, scored: Artifact) -> None:
    """The error names each reason; run again, it comes without a training."""
    broken = with_sweep(config, betas=(1e37, 1e38))
    with pytest.raises(RunError, match=r"Every trial.*beta=1e\+37.*not finite"):
        sweep(broken, scored, LOCAL)

    again = Counting()
    with pytest.raises(RunError, match="Every trial"):
        sweep(broken, scored, again)
    assert again.trained == []


def test_any_other_error_ends_the_sweep(config: RunConfig, scored: Artifact) -> None:
    """A bug is no finding about a beta."""

    class Broken(InProcess):
        def run_ranks(self, job: RankJob) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        sweep(with_sweep(config, betas=(0.1, 0.2)), scored, Broken())


def test_without_anything_to_try_the_configs_own_settings_go_on(config: RunConfig, scored: Artifact) -> None:
    """Nothing is trained, and the training is the config's."""
    own = with_train(config, beta=0.3)

    made = sweep(own, scored, LOCAL)

    assert made.record.details["beta"] == 0.3
    assert made.record.counts["trials"] == 0
    assert chosen_config(own, made) == own


def test_settings_lead_to_a_training_of_their_own(config: RunConfig, scored: Artifact) -> None:
    """Everything that was chosen is trained with, not beta alone, and as long as the config says."""
    varied = with_sweep(config, betas=(0.5,), learning_rates=(1e-9, 5e-3), lora_ranks=(2,), max_steps=4)

    made = sweep(varied, scored, LOCAL)

    assert made.record.details["parameters"] == {"beta": 0.5, "learning_rate": 5e-3, "lora.rank": 2}
    policy = train(chosen_config(varied, made), scored, LOCAL)
    content = policy.record.config
    assert not policy.reused
    found = content["beta"], content["learning_rate"], content["lora"]["rank"], content["max_steps"]
    assert found == (0.5, 5e-3, 2, 8)


def test_the_winners_policy_is_the_training_and_what_was_there_before_stays(
    config: RunConfig, scored: Artifact
) -> None:
    """A loser that somebody had trained is taken as it is and left; the winner is what ``train`` makes by itself."""
    before = train(with_train(config, beta=0.1), scored, LOCAL)
    taken = with_sweep(config, betas=(0.1, 0.5, 1.0), use="policy")
    counting = Counting()

    made = sweep(taken, scored, counting)

    assert made.record.details["beta"] == 1.0
    assert counting.trained == [(0.5, None), (1.0, None)]
    assert policies(config) == sorted([before.address, made.record.details["policy"]])
    policy = train(chosen_config(taken, made), scored, LOCAL)
    assert (policy.reused, policy.address) == (True, made.record.details["policy"])
    alone = train(with_train(elsewhere(config), beta=1.0), scored, LOCAL)
    assert same_weights(policy, alone)


def test_halving_goes_on_with_the_better_half_bit_for_bit(config: RunConfig, scored: Artifact) -> None:
    """Of four, two stop at step 2 and one at step 4; the winner is an unbroken training's policy, with its history."""
    halved = with_sweep(config, betas=BETAS, halving=2, use="policy")
    counting = Counting()

    made = sweep(halved, scored, counting)

    trials = trials_of(made)
    assert [pause for _, pause in counting.trained] == [2, 2, 2, 2, 4, 4, None]
    assert sorted(trial["steps"] for trial in trials.values()) == [2, 2, 4, 8]
    assert made.record.counts["stopped"] == 3
    assert all(trial["kl"]["n"] == 2 and trial["length_ratio"] for trial in trials.values())
    reasons = made.record.details["why_not"].values()
    assert sorted(why.partition(":")[0] for why in reasons) == ["stopped at step 2"] * 2 + ["stopped at step 4"]
    winner = trials[f"beta={made.record.details['beta']:g}"]
    assert [point["step"] for point in winner["points"]] == [2, 4, 8]
    assert policies(config) == [made.record.details["policy"]]
    policy = train(chosen_config(halved, made), scored, LOCAL)
    alone = train(chosen_config(elsewhere(halved), made), scored, LOCAL)
    assert (policy.reused, alone.reused) == (True, False)
    assert same_weights(policy, alone)
    assert curve(policy) == curve(alone)


def curve(artifact: Artifact) -> list[list[float | None]]:
    """What two equal trainings share."""
    lines = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in ("loss", "grad_norm", "learning_rate", "validation/loss")] for line in lines]


def test_halving_does_not_depend_on_what_was_trained_before(config: RunConfig, scored: Artifact) -> None:
    """A complete training of a setting that stops early says nothing about its first rung, and is left alone."""
    before = train(with_train(config, beta=0.05), scored, LOCAL)
    halved = with_sweep(config, betas=BETAS, halving=2, use="policy", num_prompts=0)

    made = sweep(halved, scored, LOCAL)

    clean = sweep(elsewhere(halved), scored, LOCAL)
    assert trials_of(made) == trials_of(clean)
    assert trials_of(made)["beta=0.05"]["stopped"]
    assert policies(config) == sorted([before.address, made.record.details["policy"]])
    assert list(made.path.rglob("*.safetensors")) == []


def test_interrupted_sweep_trains_and_measures_only_what_is_left(config: RunConfig, scored: Artifact) -> None:
    """Ctrl-C after the second trial's training: the first is not trained or measured again; the result is equal."""
    swept = with_sweep(config, betas=(0.1, 0.5), max_steps=3)

    class Interrupted(Counting):
        def run_ranks(self, job: RankJob) -> None:
            super().run_ranks(job)
            if len(self.trained) == 2:
                raise KeyboardInterrupt

    first, second, whole = Interrupted(), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        sweep(swept, scored, first)

    made = sweep(swept, scored, second)

    unbroken = sweep(elsewhere(swept), scored, whole)
    assert [beta for beta, _ in second.trained] == [0.5]
    assert first.asked + second.asked == whole.asked
    assert trials_of(made) == trials_of(unbroken)
    assert made.record.details == unbroken.record.details


def test_only_the_best_so_far_stays_in_the_store(config: RunConfig, scored: Artifact) -> None:
    """After each trial's end there is one policy: disk use does not grow with the number of trials."""
    seen: list[int] = []
    counting = Counting(lambda: seen.append(len(policies(config))))

    sweep(with_sweep(with_train(config, max_steps=2), betas=BETAS, use="policy", num_prompts=0), scored, counting)

    assert seen == [1, 1, 1, 1]


def test_seeds_of_a_setting_are_trainings_of_their_own(config: RunConfig, scored: Artifact) -> None:
    """Two betas with two seeds: four trials, whose curves differ by their seed, and one setting chosen.

    Over its seeds each beta has every validation pair right, so the larger one, which is more careful, wins.
    """
    made = sweep(with_sweep(config, betas=(0.1, 0.5), seeds=2, max_steps=2, num_prompts=0), scored, LOCAL)

    assert trials_of(made).keys() == {f"beta={beta},seed={seed}" for beta in (0.1, 0.5) for seed in (0, 1)}
    curves = [(made.path / "trials" / f"beta=0.1,seed={seed}" / "metrics.jsonl").read_text() for seed in (0, 1)]
    first, second = ([json.loads(line)["loss"] for line in each.splitlines()] for each in curves)
    assert first != second
    assert {trial["accuracy"]["value"] for trial in trials_of(made).values()} == {1.0}
    assert made.record.details["parameters"] == {"beta": 0.5}
    assert made.record.details["why_not"]["beta=0.5,seed=1"] == "another seed of the chosen setting, beta=0.5"


def test_optuna_proposes_within_its_range(config: RunConfig, scored: Artifact) -> None:
    """Five trials in rounds of four, none twice."""
    pytest.importorskip("optuna")
    space = LogUniform(low=0.05, high=2.0)

    made = sweep(with_sweep(config, betas=space, search="optuna", trials=5, max_steps=1, num_prompts=0), scored, LOCAL)

    betas = [trial["parameters"]["beta"] for trial in trials_of(made).values()]
    assert len(set(betas)) == 5
    assert all(0.05 <= beta <= 2 for beta in betas)


def test_budget_that_no_trial_meets_is_one_error(config: RunConfig, scored: Artifact) -> None:
    """It names the smallest KL that was found."""
    swept = with_sweep(config, betas=(0.1,), num_prompts=8, select=SelectConfig(max_kl=1e-6))

    with pytest.raises(RunError, match=r"within the budgets.*KL.*beta=0\.1"):
        sweep(swept, scored, LOCAL)


def test_more_trials_than_pairs_are_refused_before_training(config: RunConfig, scored: Artifact) -> None:
    """Some 120 training pairs, 400 trials."""
    counting = Counting()

    with pytest.raises(ConfigError, match="more trials than there are pairs"):
        sweep(with_sweep(config, betas=tuple(0.01 * n for n in range(1, 401))), scored, counting)
    assert counting.trained == []


def test_sweep_needs_validation_pairs(config: RunConfig) -> None:
    """Beta is not chosen on held-out pairs."""
    without = replace(config, prepare=replace(config.prepare, validation_fraction=0.0))
    scored = score_reference(without, prepare(without, LOCAL), LOCAL)

    with pytest.raises(ConfigError, match="no validation pairs"):
        sweep(with_sweep(without, betas=(0.1,)), scored, LOCAL)


def test_progress_is_of_all_trials_together(
    config: RunConfig, scored: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials of three steps: one to six of six, and a message when each has ended."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))

    sweep(with_sweep(config, betas=(0.1, 0.5), max_steps=3), scored, LOCAL)

    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in events} == {"sweep"}
    steps = [(event["done"], event["total"]) for event in events if event["kind"] == "progress"]
    assert steps == [(done, 6) for done in range(1, 7)]
    told = [event["text"] for event in events if event["kind"] == "message"]
    assert any(text.startswith("trial 1 of 2, beta=0.1: accuracy") for text in told)
