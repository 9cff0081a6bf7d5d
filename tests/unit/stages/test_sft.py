"""The SFT stage: what it makes, when it is reused, and that everything after it starts from its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train import launch
from dpo_train.artifacts import Artifact
from dpo_train.config import LoraConfig, ModelConfig, RunConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, NonFiniteLossError, PreemptedError, StoreError
from dpo_train.model.load import Policy, load_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.progress import Reporter
from dpo_train.stages import prepare, score_reference, sft, train
from dpo_train.stages.executor import InProcess
from dpo_train.train.job import TrainJob
from dpo_train.train.ranks import Ranks
from dpo_train.train.sft import Sft
from dpo_train.train.speed import NAMES as SPEED_NAMES
from dpo_train.train.worker import run_rank
from tests.command import Finished, dpo, refused, write_config
from tests.tiny import tiny_config
from tests.unit.stages.test_rankings import RANKINGS, write_nectar

LOCAL = InProcess()
SFT: dict[str, Any] = {
    "sft__enabled": True, "sft__learning_rate": 5e-3, "sft__warmup_steps": 2, "sft__batch_pairs": 16, "sft__epochs": 4,
    "sft__max_steps": 20, "sft__row_tokens": 256, "sft__checkpoint_steps": 5, "sft__evaluate_steps": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("sft"), **SFT)


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> Artifact:
    return prepare(config, LOCAL)


@pytest.fixture(scope="module")
def made(config: RunConfig, pairs: Artifact) -> Artifact:
    return sft(config, pairs, LOCAL)


def with_(config: RunConfig, section: str, **changes: object) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def _history(artifact: Artifact) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED_NAMES} for line in lines]


def _heldout(pairs: Artifact) -> list[TokenPair]:
    return list(Split(pairs, "heldout").pairs(chosen_alone=True))


def _policy(path: Path | str) -> Policy:
    return load_policy(ModelConfig(path=str(path)), device=torch.device("cpu"), frozen_base=False)


def test_heldout_answers_become_likelier(config: RunConfig, pairs: Artifact, made: Artifact) -> None:
    """Of pairs that no step has seen, an answer token costs less than half the nats that it cost before."""
    answers, method = _heldout(pairs), Sft(config.sft)
    before, after = (
        method.evaluate(_policy(path), answers, Ranks())["loss"] for path in (config.model.path, made.path / "model")
    )
    assert after < 0.5 * before
    record = made.record
    assert record.counts == {"steps": 20, "validation_pairs": Split(pairs, "validation").num_pairs}
    assert record.metrics["loss"] < 0.5 * record.metrics["first_loss"]
    assert record.metrics["validation/loss"] == _history(made)[-1]["validation/loss"]
    assert launch.summary(made).startswith("20 steps, loss ")


def test_output_is_a_model_folder_without_checkpoints(config: RunConfig, made: Artifact) -> None:
    """Weights, config and tokenizer; nothing of the training's own remains."""
    files = set(made.record.files)
    assert files >= {"metrics.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json"}
    assert not [name for name in files if name.startswith(("adapter/", "checkpoints/"))]
    assert not (made.path / "checkpoints").exists()


def test_rerun_is_reused_and_other_settings_are_not(config: RunConfig, pairs: Artifact, made: Artifact) -> None:
    """What trains changes the output; where it runs and how often it saves does not."""
    again = sft(with_(with_(config, "sft", checkpoint_steps=7), "compute", workers=3), pairs, LOCAL)
    assert again.reused
    assert again.record == made.record
    other = sft(with_(config, "sft", max_steps=1), pairs, LOCAL)
    assert not other.reused
    assert other.record.details["model"] != made.record.details["model"]


class Preempted(InProcess):
    """Takes the machine away after step 7, once."""

    def run_ranks(self, job: TrainJob) -> None:
        steps = iter(range(1, 1000))
        run_rank(job, Ranks(), is_preempted=lambda: next(steps) == 7)


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None], ids=["lora", "full"])
def test_resumed_stage_makes_what_an_unbroken_one_makes(
    config: RunConfig, pairs: Artifact, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """Stopped between two checkpoints and begun again: weights and history are equal bit for bit."""
    config = with_(config, "sft", lora=lora, max_steps=12)
    unbroken = sft(config, pairs, LOCAL, output=tmp_path / "unbroken")
    with pytest.raises(PreemptedError):
        sft(config, pairs, Preempted(), output=tmp_path / "broken")
    resumed = sft(config, pairs, LOCAL, output=tmp_path / "broken")
    file = "model/model.safetensors"
    assert resumed.file(file).read_bytes() == unbroken.file(file).read_bytes()
    assert resumed.record.details == unbroken.record.details
    assert _history(resumed) == _history(unbroken)


def test_stage_killed_before_its_record_trains_nothing_again(
    config: RunConfig, pairs: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps done, the model saved, then killed: the last step's checkpoint is there to go on from."""

    class Killed(InProcess):
        def run_ranks(self, job: TrainJob) -> None:
            super().run_ranks(job)
            raise KeyboardInterrupt

    config = with_(config, "sft", max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        sft(config, pairs, Killed(), output=tmp_path / "out")
    monkeypatch.setenv("DPO_EVENTS", str(tmp_path / "events.jsonl"))
    made = sft(config, pairs, LOCAL, output=tmp_path / "out")
    assert made.record.counts["steps"] == 3
    assert not (tmp_path / "events.jsonl").exists()


def test_adapters_are_merged_into_the_model(
    config: RunConfig, pairs: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved model's log-probs are those of base and adapters, to 1e-5, and not the base's."""
    lora = with_(config, "sft", lora=LoraConfig(rank=4, alpha=8.0))
    kept: list[Path] = []

    class Keeping(InProcess):
        def run_ranks(self, job: TrainJob) -> None:
            super().run_ranks(job)
            kept.append(Path(shutil.copytree(Path(job.output) / "checkpoints" / "adapter", tmp_path / "adapter")))

    made = sft(lora, pairs, Keeping())
    assert not (made.path / "adapter").exists()
    model = ModelConfig(path=config.model.path)
    adapted = load_policy(model, device=torch.device("cpu"), weights=kept[0].parent)
    assert adapted.adapters is not None
    row = build_row(_heldout(pairs)[:8])
    with torch.no_grad():
        wanted = row_logps(adapted, row).token_logps_A
        found = row_logps(_policy(made.path / "model"), row).token_logps_A
        base = row_logps(_policy(config.model.path), row).token_logps_A
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (base - wanted).abs().max() > 0.5


def test_off_is_an_output_without_a_model(config: RunConfig, pairs: Artifact) -> None:
    """The same one whatever the other keys say; later stages then start from the config's model."""
    off = with_(config, "sft", enabled=False)
    made = sft(off, pairs, LOCAL)
    assert made.record.details == {"enabled": False}
    assert made.record.files == {}
    assert launch.summary(made) == "off"
    assert sft(with_(off, "sft", epochs=7), pairs, LOCAL).reused
    assert launch.with_sft_model(off, made) == off


def test_row_that_is_too_short_is_refused_before_a_model_is_loaded(config: RunConfig, pairs: Artifact) -> None:
    """By the longest prompt with its chosen answer alone."""

    class Never(InProcess):
        def run_ranks(self, job: TrainJob) -> None:
            raise AssertionError(job)

    longest = max(pair.num_tokens for name in ("train", "validation") for pair in Split(pairs, name).pairs(
        chosen_alone=True))  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{longest} tokens \(prompt and chosen answer\), sft\.row_tokens"):
        sft(with_(config, "sft", row_tokens=longest - 1), pairs, Never())
    enough = sft(with_(config, "sft", row_tokens=longest, max_steps=1), pairs, LOCAL)
    assert enough.record.counts["steps"] == 1


def test_rankings_teach_their_best_answer(tmp_path: Path) -> None:
    """With prepare.pairing=ranking the best answer of each record is trained on, and nothing of the rest."""
    data = write_nectar(tmp_path / "nectar.jsonl", 60)
    ranked = tiny_config(tmp_path, **SFT, **RANKINGS, prepare__path=str(data), sft__lora={"rank": 4})
    pairs = prepare(ranked, LOCAL)
    rankings = list(Split(pairs, "train").pairs())
    assert any(pair.other_ids for pair in rankings)
    made = sft(ranked, pairs, LOCAL)
    history = _history(made)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    shown = len(history) * 16 / len(rankings)  # passes over the rankings
    best = sum(len(pair.chosen_ids) for pair in rankings)
    assert sum(line["answer_tokens"] for line in history) == pytest.approx(shown * best, rel=0.1)
    scored = score_reference(launch.with_sft_model(ranked, made), pairs, LOCAL)
    assert scored.record.inputs["model"] == made.record.details["model"]


def test_whole_flow_starts_from_the_sft_model_and_registers_what_comes_of_it(config: RunConfig, made: Artifact) -> None:
    """The reference is the SFT model: the first step's drift is zero, and against the config's own model it is not."""
    pytest.importorskip("mlflow")
    result = launch.run(config)
    artifacts = result.artifacts
    assert list(artifacts) == list(launch.INPUTS)
    assert artifacts["sft"].home == made.home
    digest = made.record.details["model"]
    assert {
        artifacts[name].record.inputs["model"] for name in ("score_reference", "train", "evaluate", "register")
    } == {digest}
    first = _history(artifacts["train"])[0]
    assert abs(first["drift/chosen"]) < 1e-4
    assert abs(first["drift/rejected"]) < 1e-4
    assert result.metrics["heldout/accuracy_low"] > 0.5
    on = launch.with_sft_model(config, made)
    assert on.model.path == str(made.path / "model")
    with pytest.raises(ConfigError, match="scored by another model"):
        train(config, artifacts["score_reference"], LOCAL)
    off = launch.run_stage("score_reference", with_(config, "sft", enabled=False), {"prepare": artifacts["prepare"]})
    assert off.record.inputs["model"] != digest
    assert result.model_uri == "models:/dpo-policy/1"
    (weights,) = (Path(config.store) / "mlartifacts").rglob("model.safetensors")
    _check_registered(weights.parent, artifacts)


def _check_registered(folder: Path, artifacts: Mapping[str, Artifact]) -> None:
    """Its log-probs of held-out answers are those of SFT's model with DPO's adapters."""
    start = ModelConfig(path=str(artifacts["sft"].path / "model"))
    trained = load_policy(start, device=torch.device("cpu"), weights=artifacts["train"].path)
    row = build_row(_heldout(artifacts["prepare"])[:8])
    with torch.no_grad():
        wanted, found = row_logps(trained, row).token_logps_A, row_logps(_policy(folder), row).token_logps_A
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_output_of_another_setting_is_refused(config: RunConfig, pairs: Artifact, made: Artifact) -> None:
    """A model that nobody asked for, and one that was asked for and is not there."""
    off = sft(with_(config, "sft", enabled=False), pairs, LOCAL)
    with pytest.raises(StoreError, match=r"another sft\.enabled. Got: False. Expected: True"):
        launch.with_sft_model(config, off)
    with pytest.raises(StoreError, match=r"Got: True. Expected: False"):
        launch.with_sft_model(with_(config, "sft", enabled=False), made)


def test_steps_are_logged_as_they_come(config: RunConfig, tmp_path: Path) -> None:
    """MLflow follows SFT's steps as it follows DPO's."""
    pytest.importorskip("mlflow")
    from dpo_train.tracking import RunLog, Tracking, following

    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "sft", parent=None, tags={})
    events = tmp_path / "events.jsonl"
    with following(run, events, "sft") as logged:
        Reporter(str(events), "sft").progress(1, 2, "steps", loss=3.5)
        Reporter(str(events), "train").progress(2, 2, "steps", loss=0.7)
    assert logged == {0}
    assert run.close() is None
    assert [point.value for point in tracking.client.get_metric_history(run.run_id, "loss")] == [3.5]


def test_diverging_sft_names_its_step(config: RunConfig, pairs: Artifact, tmp_path: Path) -> None:
    """A rate at which the weights overflow: the run failed, and the output is not complete."""
    hot = with_(config, "sft", learning_rate=1e30, schedule="constant", warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step 1\..*lower sft\.learning_rate") as raised:
        sft(hot, pairs, LOCAL, output=tmp_path / "out")
    assert raised.value.exit_code == 1
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.fixture(scope="module")
def config_file(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    short = with_(replace(config, store=str(folder / "store")), "sft", max_steps=2)
    return write_config(short, folder / "config.yaml")


def _dpo(config_file: Path, command: str, *arguments: str) -> Finished:
    return dpo(command, str(config_file), *arguments, store=config_file.parent / "store")


@pytest.fixture(scope="module")
def first(config_file: Path) -> Finished:
    return _dpo(config_file, "sft")


def test_command_makes_what_it_reads_and_says_what_came_out(first: Finished) -> None:
    """`dpo sft` prepares the data first, and ends with 0."""
    assert first.code == 0, first.output + first.log[-3000:]
    assert list(first.ends()) == ["prepare", "sft"]
    assert "2 steps, loss" in first.output


@pytest.mark.slow
def test_named_inputs_are_taken_and_the_models_output_is_no_garbage(first: Finished, config_file: Path) -> None:
    """With pairs and model named nothing else runs; what the model was made for keeps its output."""
    ends = first.ends()
    named = ("--pairs", ends["prepare"]["path"], "--sft", ends["sft"]["path"])
    scored = _dpo(config_file, "score-reference", *named)
    assert scored.code == 0, scored.output
    assert list(scored.ends()) == ["score_reference"]
    assert scored.record("score_reference")["inputs"]["model"] == first.record("sft")["details"]["model"]
    # The newest run knows the scored pairs alone.
    assert "could be removed" in (kept := _dpo(config_file, "gc", "--keep-runs", "1").output)
    assert ends["sft"]["address"] not in kept
    assert ends["prepare"]["address"] not in kept


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        ("sft", ["sft.row_tokens=8"], "sft.row_tokens=8"),
        ("sft", ["sft.optimizer=rmsprop", "sft.weight_decay=0.1"], "sft.weight_decay has no meaning with rmsprop"),
        ("sft", ["sft.keep=best"], "sft.keep"),
        ("train", ["sft.enabled=false", "--sft", "somewhere"], "--sft names an output that nothing would read"),
        ("train", ["--sft", "nowhere"], "holds no output"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(
    first: Finished,
    config_file: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    arguments: Sequence[str],
    told: str,
) -> None:
    """One message, no traceback."""
    made = first.ends()["sft"]["path"]
    arguments = [made if text == "somewhere" else text for text in arguments]
    assert told in refused(capfd, command, config_file, *arguments)
