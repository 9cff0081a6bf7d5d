"""The whole pipeline as a person runs it: ``dpo run`` on the compiled YAML, with real Ray, kfp.local and MLflow.

The folder's name holds "python3", an apostrophe and ``{{$``, which kfp.local is known to damage.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import Finished, dpo, write_config
from tests.tiny import tiny_config, write_pairs

pytest.importorskip("kfp")
pytest.importorskip("ray")
pytest.importorskip("mlflow")

STAGES = ["prepare", "sft", "score_reference", "sweep", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("it's") / "python3 {{$.x}}"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def config_file(folder: Path) -> Path:
    config = tiny_config(
        folder, compute__executor="ray", compute__workers=2, sweep__betas=[0.1, 0.5], sweep__max_steps=3,
        register__model_name="tiny", tracking__uri=None,
    )  # fmt: skip
    return write_config(config, folder / "config.yaml")


@pytest.fixture(scope="module")
def first(config_file: Path, folder: Path) -> Finished:
    finished = dpo("run", str(config_file), store=folder / "store")
    assert finished.code == 0, finished.output + finished.log[-5000:]
    return finished


def test_all_stages_run_and_the_terminal_shows_the_result(first: Finished) -> None:
    """Every stage ran, in order; the terminal says accuracy with its interval, samples, version and how to browse."""
    assert [event["stage"] for event in first.events if event["kind"] == "end"] == STAGES
    assert not any(end["reused"] for end in first.ends().values())
    for text in ("held-out pairs (95 % interval)", "samples on held-out prompts", "tiny version 1", "dpo ui"):
        assert text in first.output
    assert "Traceback" not in first.output


def test_library_noise_is_in_the_named_log_only(first: Finished) -> None:
    """What Ray and kfp print is in the log, whose path is printed."""
    assert str(first.run_folder / "run.log") in first.output
    assert "score-reference" in first.log
    assert "Executing task" in first.log
    assert "Executing task" not in first.output


def test_training_ran_in_two_worker_processes(first: Finished) -> None:
    """Ray Train started two ranks, each a process of its own."""
    notes = [json.loads(f.read_text()) for f in (Path(first.ends()["train"]["path"]) / "ranks").iterdir()]

    assert sorted(note["rank"] for note in notes) == [0, 1]
    assert {note["world_size"] for note in notes} == {2}
    assert len({note["pid"] for note in notes}) == 2


def test_it_learned_and_started_at_ln_2(first: Finished) -> None:
    """The first loss is ln 2; held-out accuracy is above chance."""
    train, evaluate = first.record("train"), first.record("evaluate")

    assert train["metrics"]["first_loss"] == pytest.approx(0.69314718, rel=1e-4)
    assert train["metrics"]["loss"] < 0.9 * train["metrics"]["first_loss"]
    assert evaluate["metrics"]["heldout/accuracy_low"] > 0.5
    assert evaluate["metrics"]["heldout/margin"] > 0


def test_progress_shows_pairs_per_second_loss_and_margin(first: Finished) -> None:
    """Training reports every step, with what a person wants to see move."""
    steps = [e for e in first.events if e["stage"] == "train" and e["kind"] == "progress"]

    assert [event["done"] for event in steps] == list(range(1, 21))
    assert all({"pairs_per_second", "loss", "rewards/margin"} <= event["metrics"].keys() for event in steps)


def test_mlflow_holds_one_parent_with_stages_and_trials_below(first: Finished) -> None:
    """Pipeline run > stage runs > trials, all finished, with parameters, metrics by step, digests and code version."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{first.store}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dpo").experiment_id])
    by_kind: dict[str, list] = {}
    for run in runs:
        by_kind.setdefault(run.data.tags["dpo.kind"], []).append(run)
    (parent,) = by_kind["pipeline"]
    stages = {run.data.tags["dpo.stage"]: run for run in by_kind["stage"]}

    assert {run.info.status for run in runs} == {"FINISHED"}
    assert set(stages) == set(STAGES)
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in stages.values())
    assert {t.data.tags["mlflow.parentRunId"] for t in by_kind["trial"]} == {stages["sweep"].info.run_id}
    assert len(by_kind["trial"]) == 2
    assert parent.data.params["train.learning_rate"] == "0.005"
    history = client.get_metric_history(stages["train"].info.run_id, "loss")
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(1, 21))
    tags = stages["train"].data.tags
    assert tags["dpo.input.scored"] == first.record("score_reference")["digest"]
    assert tags["dpo.code_version"] == first.record("train")["code_version"]
    for stage in ("prepare", "evaluate"):
        files = {f.path for f in client.list_artifacts(stages[stage].info.run_id)}
        assert files >= {"report.html", "report.json", "record.json"}
    (data,) = stages["prepare"].inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.source_type) == ("pairs.jsonl", "local")
    assert data.dataset.digest == first.record("prepare")["inputs"]["data"]


def test_registered_version_generates_text_in_a_fresh_process(first: Finished) -> None:
    """models:/tiny/1 loads with both flavors and answers."""
    program = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.transformers.load_model("models:/tiny/1")
print("TRANSFORMERS", model("hello", max_new_tokens=3)[0]["generated_text"])
chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
print("PYFUNC", mlflow.pyfunc.load_model("models:/tiny@challenger").predict(chat))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program, f"sqlite:///{first.store}/mlflow.db"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip

    assert finished.returncode == 0, finished.stderr
    assert "TRANSFORMERS hello" in finished.stdout
    assert "'role': 'assistant'" in finished.stdout.split("PYFUNC")[1]


def test_second_run_reuses_every_output(first: Finished, config_file: Path) -> None:
    """The same command runs nothing again, and the registry has no second version."""
    second = dpo("run", str(config_file), store=first.store)

    assert second.code == 0, second.output
    assert all(end["reused"] for end in second.ends().values())
    assert [end["address"] for end in second.ends().values()] == [end["address"] for end in first.ends().values()]
    assert "tiny version 1" in second.output


@pytest.mark.slow
def test_other_betas_rerun_only_what_depends_on_them(first: Finished, config_file: Path) -> None:
    """Pairs and reference scores do not depend on beta; sweep, training, report and version do."""
    other = dpo("run", str(config_file), "sweep.betas=[]", "train.beta=0.9", store=first.store)

    assert other.code == 0, other.output
    reused = {stage for stage, end in other.ends().items() if end["reused"]}
    assert reused == {"prepare", "sft", "score_reference"}
    assert other.record("train")["details"]["beta"] == 0.9
    assert "tiny version 2" in other.output


@pytest.mark.slow
def test_other_swept_betas_rerun_the_sweep_and_what_follows_from_its_choice(first: Finished, config_file: Path) -> None:
    """Another list of betas is another sweep; training and what follows are redone only if it chooses another beta."""
    other = dpo("run", str(config_file), "sweep.betas=[0.7, 0.1]", "compute.executor=local", store=first.store)

    assert other.code == 0, other.output
    made = {stage for stage, end in other.ends().items() if not end["reused"]}
    same = other.record("sweep")["details"]["beta"] == first.record("sweep")["details"]["beta"]
    assert made == ({"sweep"} if same else {"sweep", "train", "evaluate", "register"})
    trials = sorted(path.name for path in (Path(other.ends()["sweep"]["path"]) / "trials").glob("beta=*"))
    assert trials == ["beta=0.1", "beta=0.7"]


@pytest.mark.slow
def test_flow_that_starts_with_sft_aligns_the_model_it_made(first: Finished, config_file: Path) -> None:
    """Every task after sft takes its model: the reference is it, and DPO starts at ln 2 from there."""
    finished = dpo(
        "run", str(config_file), "sft.enabled=true", "sft.learning_rate=5e-3", "sft.max_steps=5", "sweep.betas=[]",
        store=first.store,
    )  # fmt: skip

    assert finished.code == 0, finished.output + finished.log[-5000:]
    assert {stage for stage, end in finished.ends().items() if end["reused"]} == {"prepare"}
    sft, train = finished.record("sft"), finished.record("train")
    assert sft["metrics"]["loss"] < sft["metrics"]["first_loss"]
    for stage in ("score_reference", "train", "evaluate", "register"):
        assert finished.record(stage)["inputs"]["model"] == sft["details"]["model"]
    assert train["metrics"]["first_loss"] == pytest.approx(0.69314718, rel=1e-4)
    notes = [json.loads(f.read_text()) for f in (Path(finished.ends()["sft"]["path"]) / "ranks").iterdir()]
    assert sorted(note["rank"] for note in notes) == [0, 1]


@pytest.mark.slow
def test_shuffled_labels_exit_1_and_register_nothing(tmp_path: Path) -> None:
    """With random labels there is nothing to learn: the command says so and exits 1."""
    write_pairs(tmp_path / "pairs.jsonl", shuffle_labels=True)
    config = tiny_config(tmp_path, tracking__uri=None)

    finished = dpo("run", str(write_config(config, tmp_path / "config.yaml")), store=tmp_path / "store")

    assert finished.code == 1, finished.output
    assert "did not learn" in finished.output
    assert "Traceback" not in finished.output
    assert "register" not in finished.ends()


def test_gate_that_refuses_exits_3_with_the_report(tmp_path: Path) -> None:
    """The run is complete and no task failed; the rule that failed is in the report, and nothing is registered."""
    from mlflow.tracking import MlflowClient

    config = tiny_config(tmp_path, evaluate__gate__min_margin=1e6, tracking__uri=None)

    finished = dpo("run", str(write_config(config, tmp_path / "config.yaml")), store=tmp_path / "store")

    assert finished.code == 3, finished.output
    assert "gate refused" in finished.output
    assert "accuracy" in finished.output
    assert (Path(finished.ends()["evaluate"]["path"]) / "report.html").is_file()
    register = finished.record("register")["details"]
    assert (register["registered"], "margin" in register["reason"]) == (False, True)
    client = MlflowClient(f"sqlite:///{finished.store}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dpo").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [run.data.tags["dpo.registered"] for run in runs if run.data.tags["dpo.kind"] == "pipeline"] == ["false"]
    assert client.search_registered_models() == []
