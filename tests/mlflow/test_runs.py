"""`dpo runs` and `dpo reproduce` over a real server."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from dpo_train.cli import main
from dpo_train.config import RunConfig, SweepConfig, load_config
from dpo_train.stages.sweep_run import _training
from dpo_train.tracking import RunLog, Tracking, tracking_uri
from dpo_train.tracking.search import quoted
from tests.command import write_config
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def config(server: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("runs")
    more = {"sweep__max_steps": 3, "train__keep": "best", "train__patience": 2}
    return tiny_config(folder, tracking__uri=server, tracking__experiment="runs", seed=7, **more)


@pytest.fixture(scope="module")
def file(config: RunConfig) -> str:
    return str(write_config(config, Path(config.store).parent / "my.yaml"))


@pytest.fixture(scope="module")
def made(config: RunConfig) -> dict[str, str]:
    """Two pipelines; the better one has a sweep with a trial."""
    ids = {}
    for name, accuracy, beta in (("worse", 0.6, 0.5), ("better", 0.8, 0.1)):
        tracking = Tracking(replace(config, train=replace(config.train, beta=beta)))
        ids[name] = tracking.start_pipeline(name)
        numbers = {"heldout/accuracy": accuracy, "heldout/accuracy_low": accuracy - 0.1, "samples/kl": 3.25}
        pipeline = RunLog.existing(tracking, Path(config.store), ids[name])
        pipeline.numbers({**numbers, "heldout/accuracy_high": accuracy + 0.1})
        pipeline.end("FINISHED")
        assert pipeline.close() is None
    tags = {"dpo.kind": "stage", "dpo.stage": "sweep"}
    sweep = RunLog.start(tracking, Path(config.store), "sweep", parent=ids["better"], tags=tags)
    sweep.trial("beta=1", parameters={"train.beta": "1", "seed": "7"}, metrics={"validation/accuracy": 0.7})
    sweep.end("FINISHED")
    assert sweep.close() is None
    experiment = tracking.experiment_id()
    [trial] = tracking.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{sweep.run_id}'")
    return {**ids, "sweep": str(sweep.run_id), "trial": trial.info.run_id}


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The cells that a program reads, without the header."""
    assert main(["runs", *arguments]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]


def test_pipelines_are_listed_with_what_they_found(
    file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest first, without stages and trials."""
    rows = listed(capsys, file)
    assert [row[0] for row in rows] == ["better", "worse"]
    name, status, age, accuracy, beta, kl, version, run_id = rows[0]
    assert (name, status, beta, kl, version) == ("better", "finished", "0.1", "3.25", "")
    assert accuracy == "0.800 [0.700, 0.900]"
    assert age.endswith((" s", " min"))
    assert run_id == made["better"]


def test_runs_are_filtered_sorted_and_limited_in_mlflows_words(
    file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with a slash or a dot need no quotation marks."""
    assert [row[0] for row in listed(capsys, file, "--where", "metrics.heldout/accuracy > 0.7")] == ["better"]
    assert [row[0] for row in listed(capsys, file, "--where", "params.train.beta = '0.5'")] == ["worse"]
    assert [row[0] for row in listed(capsys, file, "--sort", "metrics.heldout/accuracy ASC")] == ["worse", "better"]
    assert [row[0] for row in listed(capsys, file, "--limit", "1")] == ["better"]
    assert [row[0] for row in listed(capsys, file, "--kind", "trial")] == ["beta=1"]


def test_one_run_is_shown_with_what_lies_below(
    file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each level is indented by two."""
    rows = listed(capsys, file, made["better"])
    assert [(row[0], row[4]) for row in rows] == [("better", "0.1"), ("  sweep", ""), ("    beta=1", "1")]


def test_json_has_the_same_rows(file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """One object a line; an override may stand where a run could."""
    assert main(["runs", file, "seed=7", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["accuracy"], row["tags"]["dpo.seed"]) for row in rows] == [
        ("better", 0.8, "7"),
        ("worse", 0.6, "7"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "accuracy >"], "does not do what was asked"),
        (["no-such-run"], "does not do what was asked"),
        (["tracking.experiment=none"], "MLflow has no experiment 'none' yet"),
        (["--limit", "0"], "--limit must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_told(
    arguments: list[str], message: str, file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2."""
    assert main(["runs", file, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_sending_says_when_nothing_waits(file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """And is a success."""
    assert main(["runs", file, "--send"]) == 0
    assert capsys.readouterr().out == "nothing waits to be sent\n"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("better", "dpo run {} --name better"),
        ("sweep", "dpo sweep {}"),
        ("trial", "dpo train {} seed=7 train.beta=1"),
    ],
)
def test_reproduce_needs_nothing_but_the_address(
    name: str,
    command: str,
    config: RunConfig,
    server: str,
    made: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file holds the pipeline's very config, the command what is to be done with it."""
    file = tmp_path / "again.yaml"
    assert main(["reproduce", server, made[name], "--output", str(file)]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == command.format(file)
    again = load_config(file, [word for word in shlex.split(printed) if "=" in word])
    expected = _training(config, {"beta": 1.0}, 7) if name == "trial" else config
    assert again == replace(expected, sweep=again.sweep)
    assert again.sweep == (SweepConfig() if name == "trial" else config.sweep)


def test_password_of_the_address_is_written_nowhere(
    server: str, made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is named as a thing to give; what --run runs in the same process has it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # what the command sets there is undone with it
    uri, file = server.replace("//", "//me:hunter2@"), tmp_path / "again.yaml"
    assert main(["reproduce", uri, made["better"], "--output", str(file)]) == 0
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err + file.read_text()
    assert "set MLFLOW_TRACKING_URI to it" in said.err
    assert tracking_uri(load_config(file)) == uri


def test_pipeline_of_a_plugin_is_reproduced_from_its_own_run(
    config: RunConfig, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The plugin's run of a task stands below the pipeline's, which has the config; above that may be another's."""
    tracking = Tracking(config)
    above = tracking.client.create_run(tracking.experiment_id()).info.run_id
    pipeline = tracking.start_run("nightly", parent=above)
    task = tracking.start_run("resolve", parent=pipeline)
    with monkeypatch.context() as plugin:
        plugin.setenv("MLFLOW_RUN_ID", task)
        plugin.setenv("MLFLOW_TRACKING_URI", server)
        assert Tracking(config).start_pipeline("ignored") == pipeline
    file = tmp_path / "again.yaml"
    assert main(["reproduce", server, pipeline, "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"dpo run {file} --name nightly\n"


def test_runs_of_others_are_listed_as_well(
    config: RunConfig, file: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their parameters may have our names and other values; MLflow's words for the same thing are understood."""
    tracking = Tracking(config)
    theirs = tracking.client.create_run(tracking.experiment_id(), run_name="adam").info.run_id
    tracking.client.log_param(theirs, "beta", "(0.9, 0.999)")
    rows = listed(capsys, file, "--kind", "all", "--where", "param.beta LIKE '(%' and attributes.status = 'RUNNING'")
    assert [(row[0], row[4]) for row in rows] == [("adam", "")]
    assert [row[0] for row in listed(capsys, file, "--where", "metric.heldout/accuracy > 0.7")] == ["better"]


def test_reproduce_runs_it_and_says_what_differs(
    config: RunConfig, server: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A stage that stands alone, from another folder and with another version of the code: it is told, and it runs."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "prepare", parent=None, tags={"dpo.kind": "stage", "dpo.stage": "prepare"})
    tracking.log_config(str(run.run_id))
    tracking.set_tags(str(run.run_id), {"dpo.code_version": "0.0.1+other"})
    folder = Path.cwd()
    monkeypatch.chdir(tmp_path)

    assert main(["reproduce", server, str(run.run_id), "--run"]) == 0

    said = capfd.readouterr()
    assert "note: code was 0.0.1+other, is " in said.err
    assert f"relative paths in the config belong to the folder {folder}" in said.err
    assert f"dpo prepare {run.run_id}.yaml" in said.out
    assert len(list(Path(config.store).glob("prepare/*/record.json"))) == 1


def test_text_between_quotation_marks_is_left_alone() -> None:
    """It may look like a name."""
    assert quoted("tags.dpo.beta = 'tags.x/y' and metrics.loss < 1") == (
        "tags.`dpo.beta` = 'tags.x/y' and metrics.`loss` < 1"
    )
    assert quoted("metrics.`a/b` > 0") == "metrics.`a/b` > 0"
