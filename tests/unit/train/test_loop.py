"""The training's cadence: resume, step, evaluate, checkpoint."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dpo_train.config import LoraConfig, TrainConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError, PreemptedError, RunError, StoreError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.model.load import parameter_state
from dpo_train.train.checkpoint import WRITER
from dpo_train.train.job import CHECKPOINT_FOLDER, pause_note
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.speed import NAMES as SPEED_NAMES
from dpo_train.train.state import kept_line
from tests.tiny import random_pairs, tiny_policy, with_reference

# 14 pairs twice in batches of 4: seven steps, the fourth of which crosses the border of the epochs.
CONFIG = TrainConfig(
    learning_rate=5e-3,
    schedule="cosine",
    warmup_steps=2,
    batch_pairs=4,
    epochs=2,
    row_tokens=48,
    checkpoint_steps=3,
    evaluate_steps=4,
    lora=LoraConfig(rank=4),
)


class InterruptionError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def pairs(model_folder: Path) -> list[TokenPair]:
    """Eighteen pairs with their reference; the last four are for validation."""
    return with_reference(tiny_policy(model_folder, lora=False, trainable=False), random_pairs(18))


@pytest.fixture
def job(pairs: list[TokenPair], tmp_path: Path) -> Fit:
    """A training in a folder of its own."""
    return Fit(
        config=CONFIG,
        train_pairs=pairs[:14],
        validation_pairs=pairs[14:],
        seed=0,
        origin={"data": "id"},
        home=str(_folder(tmp_path, "run")),
    )


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def _run(model_folder: Path, job: Fit) -> dict[str, torch.Tensor]:
    policy = tiny_policy(model_folder, lora=job.config.lora is not None)
    fit(policy, job, Ranks())
    return parameter_state(policy)


def _stop_at(step: int) -> Callable[..., None]:
    def report(done: float, *_: Any, **__: Any) -> None:
        # Steps of a tiny model outrun the disk: what was saved in the background is complete before the next step.
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join()
        if done == step:
            raise InterruptionError

    return report


def _history(job: Fit) -> list[dict[str, float]]:
    """Without the speed and the memory, which no two runs share."""
    lines = read_history(Path(job.home) / METRICS_FILE)
    return [{name: value for name, value in line.items() if name not in SPEED_NAMES} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None], ids=["lora", "full"])
def test_resumed_training_equals_an_unbroken_one_bit_for_bit(
    model_folder: Path, job: Fit, tmp_path: Path, optimizer: str, lora: LoraConfig | None
) -> None:
    """Killed after the checkpoint of step 3, at step 5, in the second epoch: weights and history are the same."""
    job = replace(job, config=replace(CONFIG, optimizer=optimizer, lora=lora))
    unbroken = _run(model_folder, job)
    broken = replace(job, home=str(_folder(tmp_path, "broken")))
    with pytest.raises(InterruptionError):
        _run(model_folder, replace(broken, report=_stop_at(5)))
    assert [p.name for p in (Path(broken.home) / CHECKPOINT_FOLDER).iterdir()] == ["step-00000003"]
    first_part = [line["step"] for line in _history(broken)]
    resumed_steps: list[float] = []
    resumed = _run(model_folder, replace(broken, report=lambda done, *_, **__: resumed_steps.append(done)))
    assert first_part == [0, 1, 2, 3, 4]
    assert resumed_steps == [4, 5, 6, 7]
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert _history(broken) == _history(job)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_paused_training_goes_on_as_an_unbroken_one_bit_for_bit(
    model_folder: Path, job: Fit, tmp_path: Path, keep: Literal["last", "best"]
) -> None:
    """Paused at steps 2 and 5, where nothing is saved or measured otherwise; the notes hold the validation pairs."""
    job = replace(job, config=replace(CONFIG, keep=keep))
    unbroken = _run(model_folder, job)
    broken = replace(job, home=str(_folder(tmp_path, "broken")))

    for step in (2, 5):
        assert not fit(tiny_policy(model_folder), replace(broken, pause_at=step), Ranks())
        note = json.loads((Path(broken.home) / pause_note(step)).read_text())
        assert note["step"] == step == len(_history(broken))
        assert 0 <= note["metrics"]["validation/rewards/accuracy"] <= 1
    policy = tiny_policy(model_folder)
    assert fit(policy, replace(broken, pause_at=99), Ranks())

    paused = parameter_state(policy)
    assert all(torch.equal(paused[name], unbroken[name]) for name in unbroken)
    assert _history(broken) == _history(job)


def test_training_interrupted_before_its_first_checkpoint_starts_again(
    model_folder: Path, job: Fit, tmp_path: Path
) -> None:
    """Nothing was saved, so all steps are done again, and each stands once in the history."""
    broken = replace(job, home=str(_folder(tmp_path, "broken")))
    with pytest.raises(InterruptionError):
        _run(model_folder, replace(broken, report=_stop_at(2)))
    again, unbroken = _run(model_folder, broken), _run(model_folder, job)
    assert all(torch.equal(again[name], unbroken[name]) for name in unbroken)
    assert _history(broken) == _history(job)


def test_finished_training_is_not_done_again(model_folder: Path, job: Fit) -> None:
    """The last step is saved as well: were writing the policy to fail, a rerun has nothing left to train."""
    first = _run(model_folder, job)
    second = _run(model_folder, replace(job, report=_stop_at(1)))
    assert all(torch.equal(second[name], first[name]) for name in first)


def test_checkpoint_of_another_origin_is_refused(model_folder: Path, job: Fit) -> None:
    """A folder with a training on other data is not continued, and its history is left alone."""
    _run(model_folder, job)
    before = _history(job)
    with pytest.raises(StoreError, match="made by another training"):
        _run(model_folder, replace(job, origin={"data": "other"}))
    assert _history(job) == before


def test_history_has_one_line_per_step_with_its_numbers(model_folder: Path, job: Fit) -> None:
    """Seven steps; validation after step 4 and at the end; the rate follows the schedule; the loss starts at ln 2."""
    _run(model_folder, job)
    history = read_history(Path(job.home) / METRICS_FILE)
    assert [line["step"] for line in history] == list(range(7))
    assert [line["step"] for line in history if "validation/loss" in line] == [3, 6]
    # Warm-up 1/2, 1; then (1 + cos(k pi / 5)) / 2 for k = 0 to 4
    factors = [0.5, 1.0, *((1 + math.cos(k * math.pi / 5)) / 2 for k in range(5))]
    assert [line["learning_rate"] for line in history] == pytest.approx([5e-3 * factor for factor in factors])
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert all(line["grad_norm"] > 0 and line["pairs_per_second"] > 0 for line in history)


def test_training_pairs_are_learned(model_folder: Path, job: Fit) -> None:
    """Thirty passes over fourteen pairs: loss far below ln 2 and every pair right."""
    _run(model_folder, replace(job, config=replace(CONFIG, epochs=30, beta=1.0, checkpoint_steps=999)))
    last = read_history(Path(job.home) / METRICS_FILE)[-1]
    assert last["loss"] < 0.2
    assert last["rewards/accuracy"] == 1.0


def test_report_hears_of_every_step(model_folder: Path, job: Fit) -> None:
    """Done, total and unit for the progress bar, and the step's numbers."""
    heard: list[tuple[float, float, str]] = []
    losses: list[float] = []

    def report(done: float, total: float, unit: str, **metrics: float) -> None:
        heard.append((done, total, unit))
        losses.append(metrics["loss"])

    _run(model_folder, replace(job, report=report))
    assert heard == [(step, 7, "steps") for step in range(1, 8)]
    assert losses == [line["loss"] for line in _history(job)]


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 7), (2, 2), (99, 7)])
def test_number_of_steps_is_all_epochs_or_the_limit(job: Fit, max_steps: int | None, steps: int) -> None:
    """ceil(14 x 2 / 4) = 7; a limit can only shorten."""
    assert replace(job, config=replace(CONFIG, max_steps=max_steps)).total_steps == steps


@pytest.mark.parametrize(("loss", "first"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_first_loss_is_known_for_every_loss(model_folder: Path, job: Fit, loss: str, first: float) -> None:
    """ln 2, 1 and 1 / (2 x 0.1)^2: the training goes on from there."""
    _run(model_folder, replace(job, config=replace(CONFIG, loss=loss, max_steps=1)))
    assert _history(job)[0]["loss"] == pytest.approx(first, rel=1e-4)


def test_reference_of_other_weights_is_noticed_at_the_first_step(model_folder: Path, job: Fit) -> None:
    """Log-probs off by 0.1 per token cannot be this policy's own."""
    moved = [replace(p, reference_chosen_logps=p.reference_chosen_logps + 0.1) for p in job.train_pairs]
    with pytest.raises(RunError, match="does not start as its reference"):
        _run(model_folder, replace(job, train_pairs=moved, config=replace(CONFIG, beta=1.0)))


def test_training_that_stops_at_a_broken_pair_keeps_its_last_checkpoint(model_folder: Path, job: Fit) -> None:
    """The step is named by its number, and what was done before it is not lost."""
    broken = replace(job, train_pairs=list(job.train_pairs))
    pair = broken.batch(6)[0]
    index = [p.pair_id for p in job.train_pairs].index(pair.pair_id)
    first_use = next(step for step in range(7) if pair in broken.batch(step))
    broken.train_pairs[index] = replace(pair, reference_chosen_logps=pair.reference_chosen_logps * float("nan"))
    with pytest.raises(NonFiniteLossError, match=rf"step {first_use}\. Got: pairs .* \(rank 0\)"):
        _run(model_folder, broken)
    assert [line["step"] for line in _history(broken)] == list(range(first_use))


STOPPING = replace(CONFIG, epochs=6, evaluate_steps=2, schedule="constant", learning_rate=0.05, patience=2)


def _first_best(history: list[dict[str, float]], metric: str = "validation/loss") -> dict[str, float]:
    return min((line for line in history if metric in line), key=lambda line: line[metric])


def test_training_stops_when_nothing_gets_better(model_folder: Path, job: Fit) -> None:
    """At this rate validation gets worse: two measurements after the best one it is over, and all is saved."""
    _run(model_folder, replace(job, config=STOPPING))
    history = _history(job)
    best = _first_best(history)
    assert len(history) == best["step"] + 1 + 2 * 2 < job.total_steps * 3
    again = _run(model_folder, replace(job, config=STOPPING, report=_stop_at(1)))
    assert again
    assert _history(job) == history


@pytest.mark.parametrize("keep", ["best", "last"])
def test_training_leaves_the_weights_that_were_asked_for(
    model_folder: Path, job: Fit, tmp_path: Path, keep: str
) -> None:
    """Best: those of the step with the lowest validation loss, as a training that ended there has them."""
    job = replace(job, config=replace(STOPPING, keep=keep))
    left = _run(model_folder, job)
    history = _history(job)
    kept = _first_best(history) if keep == "best" else history[-1]
    assert kept_line(history, job.config) == kept
    until_then = replace(job.config, max_steps=int(kept["step"]) + 1, keep="last", patience=None)
    wanted = _run(model_folder, replace(job, config=until_then, home=str(_folder(tmp_path, "short"))))
    assert all(torch.equal(left[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_best_step_and_patience_survive_a_crash(model_folder: Path, job: Fit, tmp_path: Path, stop: int) -> None:
    """Wherever it was killed: the same steps, the same kept weights."""
    job = replace(job, config=replace(STOPPING, keep="best", checkpoint_steps=1))
    unbroken = _run(model_folder, job)
    broken = replace(job, home=str(_folder(tmp_path, "broken")))
    with pytest.raises(InterruptionError):
        _run(model_folder, replace(broken, report=_stop_at(stop)))
    resumed = _run(model_folder, broken)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert _history(broken) == _history(job)


def test_preempted_training_saves_first_and_goes_on_bit_for_bit(model_folder: Path, job: Fit, tmp_path: Path) -> None:
    """The machine says at step 2 that it will go, between two checkpoints: nothing is trained twice."""
    unbroken = _run(model_folder, job)
    broken = replace(job, home=str(_folder(tmp_path, "broken")))
    asked = iter([False, True])
    with pytest.raises(PreemptedError, match="saved after 2 steps"):
        _run(model_folder, replace(broken, is_preempted=lambda: next(asked)))
    done: list[float] = []
    resumed = _run(model_folder, replace(broken, report=lambda step, *_, **__: done.append(step)))
    assert done == [3, 4, 5, 6, 7]
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_falling_chosen_answers_are_told_once(model_folder: Path, job: Fit) -> None:
    """A rate at which both answers become unlikely: one warning with advice, in the whole training and its resumes."""
    heard: list[str] = []
    collapsing = replace(
        CONFIG, loss="unlikelihood", unlikelihood_alpha=3.0, learning_rate=0.1, warmup_steps=0, lora=None,
        checkpoint_steps=1, max_grad_norm=1e9,
    )  # fmt: skip
    job = replace(job, config=collapsing, tell=heard.append)
    with pytest.raises(InterruptionError):
        _run(model_folder, replace(job, report=_stop_at(7)))
    assert len(heard) == 1
    assert "train.beta" in heard[0]
    assert "sft" in heard[0]
    _run(model_folder, job)
    assert len(heard) == 1
    assert min(line["drift/chosen"] for line in _history(job)) < -10


def test_speed_and_filling_are_reported_with_every_step(model_folder: Path, job: Fit) -> None:
    """Rates are positive, a row is never more than full, and the memory is this process's."""
    _run(model_folder, job)
    for line in read_history(Path(job.home) / METRICS_FILE):
        assert line["tokens_per_second"] > line["pairs_per_second"] > 0
        assert 0 < line["row_fill"] <= 1
        assert 0.05 < line["peak_memory_gb"] < 50
        assert "mfu" not in line


def test_validation_that_is_not_finite_stops_the_training(model_folder: Path, job: Fit) -> None:
    """Else it would be the best value for ever: nothing is less than NaN."""
    pair = job.validation_pairs[0]
    broken = replace(pair, reference_chosen_logps=pair.reference_chosen_logps * float("nan"))
    with pytest.raises(NonFiniteLossError, match="validation pairs is not finite after 4 steps"):
        _run(model_folder, replace(job, validation_pairs=[broken, *job.validation_pairs[1:]]))


def test_history_that_lacks_steps_of_its_checkpoint_is_refused(model_folder: Path, job: Fit) -> None:
    """A power cut or a person removed lines: told at once, not after the rest of the training."""
    _run(model_folder, job)
    file = Path(job.home) / METRICS_FILE
    file.write_text("".join(file.read_text().splitlines(keepends=True)[2:]))
    with pytest.raises(StoreError, match=r"lacks steps that its checkpoint has. Got: 5 lines. Expected: 7"):
        _run(model_folder, job)


def test_order_of_pairs_depends_on_the_pairs_alone(job: Fit) -> None:
    """Another folder, origin or code gives the same batches; another pair gives others."""
    same = replace(job, home=str(Path(job.home) / "elsewhere"), origin={"data": "other"})
    other = replace(job, train_pairs=[replace(job.train_pairs[0], pair_id="new"), *job.train_pairs[1:]])
    ids = [[pair.pair_id for pair in fitting.batch(1)] for fitting in (job, same, other)]
    assert ids[0] == ids[1] != ids[2]
