"""A week of a nightly retraining: the compiled pipeline seven times, with data that arrive, stand still and turn bad.

Everything is real: kfp.local runs every task in a process of its own, MLflow is a server that is away on one day, and
the webhook is a server too. Each test says what one day must have done.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dpo_train.artifacts import open_artifact
from dpo_train.config import RunConfig, to_text
from dpo_train.report_file import read_report
from dpo_train.tracking import _client
from tests.mlflow.server import environment, free_port, running
from tests.tiny import TOPICS, tiny_config
from tests.webhook import Webhook, webhook

pytest.importorskip("kfp")
pytest.importorskip("mlflow")

# The first test waits for the whole week.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

STAGES = ["prepare", "sft", "score_reference", "sweep", "train", "evaluate", "register"]
NAME = "nightly"
WORDS = {
    "monday": (("kind", "warm", "bright", "calm"), ("rude", "cold", "dull", "grim")),
    "wednesday": (("sweet", "fair", "glad", "brave"), ("sour", "mean", "sad", "weak")),
    "sunday": (("swift", "clear", "neat", "true"), ("slow", "vague", "messy", "false")),
    "thursday": (("zero", "minus", "null", "none"), ("seven", "eleven", "twenty", "forty")),
}
"""Chosen and rejected words of each delivery: what a policy has not seen it prefers by chance."""


@dataclass(frozen=True, kw_only=True)
class Day:
    """What one run has left behind."""

    failed: bool
    ends: dict[str, dict[str, Any]]
    """The last "end" event of each stage."""
    told: list[dict[str, Any]]
    champion: str | None
    versions: list[str]
    printed: str

    @property
    def made(self) -> list[str]:
        return [stage for stage, end in self.ends.items() if not end["reused"]]

    def record(self, stage: str) -> Any:
        return open_artifact(self.ends[stage]["path"]).record

    def report(self) -> dict[str, Any]:
        return read_report(Path(self.ends["evaluate"]["path"]))


class Project:
    """The data folder, MLflow and the schedule."""

    def __init__(self, folder: Path, hook: Webhook, capfd: Callable[[], str]) -> None:
        self.folder, self._hook, self._printed = folder, hook, capfd
        self.data = folder / "data"
        self.data.mkdir()
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        # tiny_config makes pairs.jsonl where there is none; ours lie in a folder, a file for each delivery.
        (folder / "pairs.jsonl").touch()
        config = tiny_config(
            folder, prepare__path=str(self.data), prepare__heldout_fraction=0.4, prepare__validation_fraction=0.05,
            train__max_steps=12, train__learning_rate=1e-2, train__checkpoint_steps=100, train__evaluate_steps=100,
            evaluate__num_prompts=0, evaluate__min_heldout_pairs=10, evaluate__gate__min_accuracy=0.8,
            compute__device="cpu", register__model_name=NAME, tracking__uri=self.uri,
            storage__cache=str(folder / "cache"), retrain__when="new_data", retrain__promote="if_better",
            retrain__notify=["failed", "refused", "unchanged", "registered", "promoted"],
        )  # fmt: skip
        self.config: RunConfig = config

    def mlflow(self) -> AbstractContextManager[None]:
        """The server, with the same address and memory each time."""
        kept = self.folder / "mlflow"
        kept.mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{kept}/mlflow.db"),
            *("--artifacts-destination", str(kept / "artifacts")),
        ]
        return running(command, self.uri, "/health", kept / "server.log", environment())

    def deliver(self, name: str, count: int, *, coins: bool = False) -> None:
        """A file of ``count`` records, two to a conversation; with ``coins`` their labels are drawn by lot."""
        random, (good, bad) = Random(name), WORDS[name]
        lines = []
        for index in range(count):
            topics = " and ".join(random.sample(TOPICS, 2))
            answers = [f"it is {' and '.join(random.sample(words, random.randint(1, 3)))}" for words in (good, bad)]
            is_tails = random.random() < 0.5  # drawn in any case, so that the texts are the same
            if coins and is_tails:
                answers.reverse()
            prompt = [{"role": "user", "content": f"{name} {index}: tell me about the {topics}"}]
            record = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
            lines.append(json.dumps({**record, "conversation": f"{name}-{index // 2}"}) + "\n")
        (self.data / f"{name}.jsonl").write_text("".join(lines))

    def night(self, name: str, config: RunConfig | None = None, *, mlflow_away: bool = False) -> Day:
        """One run of the compiled pipeline."""
        from pipelines.local import run_local

        events = self.folder / "events" / f"{name}.jsonl"
        events.parent.mkdir(exist_ok=True)
        told = len(self._hook.received)
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {
                "DPO_EVENTS": str(events),
                "DPO_WEBHOOK_URL": self._hook.url,
                # Threads of their own would only wait for each other at this size.
                "OMP_NUM_THREADS": "1",
                **({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"} if mlflow_away else {}),
            }.items():
                patch.setenv(key, value)
            try:
                run_local(to_text(config or self.config), name)
            except RuntimeError:
                failed = True
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        with self.mlflow() if mlflow_away else nullcontext():
            versions = _client(self.uri).search_model_versions(f"name = '{NAME}'")
            models = [m for m in _client(self.uri).search_registered_models() if m.name == NAME]
        return Day(
            failed=failed,
            ends={event["stage"]: event for event in lines if event["kind"] == "end"},
            told=self._hook.received[told:],
            champion=str(models[0].aliases["champion"]) if models and "champion" in models[0].aliases else None,
            versions=sorted(version.version for version in versions),
            printed=self._printed(),
        )


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, dict[int, Day]]]:
    """The seven days, and two more."""
    from _pytest.capture import FDCapture

    capture = FDCapture(1)
    capture.start()
    with webhook() as hook, ExitStack() as up:
        project = Project(tmp_path_factory.mktemp("week"), hook, capture.snap)
        days: dict[int, Day] = {}
        up.enter_context(project.mlflow())
        project.deliver("monday", 120)
        days[1] = project.night("day 1")
        days[2] = project.night("day 2")
        project.deliver("wednesday", 80)
        days[3] = project.night("day 3")
        project.deliver("thursday", 160, coins=True)
        days[4] = project.night("day 4")
        project.deliver("thursday", 160)
        days[5] = project.night("day 5")
        up.close()
        days[6] = project.night("day 6", mlflow_away=True)
        up.enter_context(project.mlflow())
        days[7] = project.night("day 7")
        # The same data with retrain.when=always: all is reused, and the decisions of the day before stand.
        always = replace(project.config, retrain=replace(project.config.retrain, when="always"))
        days[8] = project.night("day 8", always)
        project.deliver("sunday", 120)
        further = replace(project.config, retrain=replace(project.config.retrain, start="champion"))
        days[9] = project.night("day 9", further)
        capture.done()
        yield project, days
    shutil.rmtree(project.folder / "store")


Week = tuple[Project, dict[int, Day]]


def test_day_1_the_first_model_becomes_the_champion(week: Week) -> None:
    """All stages run; there is no champion to be compared with, and the version that passed is promoted."""
    day = week[1][1]

    assert not day.failed, day.printed[-5000:]
    assert list(day.ends) == STAGES
    assert (day.champion, day.versions) == ("1", ["1"])
    (told,) = day.told
    assert (told["outcome"], told["schema_version"], told["model_version"]) == ("promoted", 1, f"{NAME}/1")
    assert "there was none" in told["message"]
    assert told["metrics"]["heldout/accuracy_low"] > 0.8
    assert told["mlflow_url"].startswith(f"{week[0].uri}/#/experiments/")
    assert told["mlflow_url"].endswith(f"/runs/{told['mlflow_run']}")
    assert told["kubeflow_run"]


def test_day_2_nothing_new_trains_nothing_and_is_green(week: Week) -> None:
    """No task but the first and the last ran, and the MLflow run is a finished one that says why."""
    project, days = week
    day = days[2]

    assert not day.failed
    assert day.ends == {}
    (told,) = day.told
    assert told["outcome"] == "unchanged"
    found = _client(project.uri).get_run(told["mlflow_run"])
    assert found.info.status == "FINISHED"
    assert found.data.tags["dpo.outcome"] == "unchanged"
    assert "the same data" in found.data.tags["dpo.why"]
    assert day.champion == "1"


def test_day_3_new_pairs_alone_are_scored_and_the_better_model_is_promoted(week: Week) -> None:
    """The champion answers on the same held-out pairs, by chance on what is new: the whole interval is above zero."""
    day = week[1][3]

    assert not day.failed
    counts = day.record("score_reference").counts
    assert (counts["pairs"], counts["newly_scored"]) == (200, 80)
    heldout = day.report()["findings"]["heldout"]
    assert heldout["champion"]["difference"]["low"] > 0
    assert heldout["champion"]["difference"]["n"] == heldout["accuracy"]["n"]
    assert day.report()["findings"]["champion"]["version"] == "1"
    assert day.champion == "2"
    (told,) = day.told
    assert told["outcome"] == "promoted"
    assert f"{NAME} version 1 on the same" in told["message"]


def test_day_4_bad_labels_are_refused_and_the_champion_stays(week: Week) -> None:
    """Nearly half of the labels are drawn by lot: the run is complete, and its gate lets nothing into the registry."""
    day = week[1][4]

    assert not day.failed
    assert "train" in day.made
    (told,) = day.told
    assert told["outcome"] == "refused"
    assert "accuracy" in told["message"]
    assert (day.champion, day.versions) == ("2", ["1", "2"])


def test_day_5_mended_data_are_trained_on(week: Week) -> None:
    """The same file with its labels put right: the pairs whose labels were right before are not scored again."""
    day = week[1][5]

    assert not day.failed
    counts = day.record("score_reference").counts
    assert counts["pairs"] == 360
    assert 0 < counts["newly_scored"] < 160
    (told,) = day.told
    assert told["outcome"] == "promoted"
    assert day.champion == "3"


def test_day_6_without_mlflow_the_run_fails_and_is_told(week: Week) -> None:
    """The first task fails; there is no MLflow run, and the webhook hears the task's own words."""
    day = week[1][6]

    assert day.failed
    assert day.ends == {}
    (told,) = day.told
    assert (told["outcome"], told["mlflow_run"], told["mlflow_url"]) == ("failed", None, None)
    assert told["message"].startswith("resolve: MLflow at")
    assert day.champion == "3"


def test_day_7_is_green_again(week: Week) -> None:
    """MLflow is back, and nothing is new."""
    day = week[1][7]

    assert not day.failed
    assert [told["outcome"] for told in day.told] == ["unchanged"]
    assert day.champion == "3"


def test_asked_for_always_the_same_data_are_a_run_that_reuses_everything(week: Week) -> None:
    """It finds its own report, which compares it with the champion before it, and its own version."""
    day = week[1][8]

    assert not day.failed
    assert day.made == []
    assert [told["outcome"] for told in day.told] == ["registered"]
    assert (day.champion, day.versions) == ("3", ["1", "2", "3"])


def test_started_from_the_champion_the_training_goes_on_from_its_weights(week: Week) -> None:
    """They are the reference too, so that the loss begins at ln 2; the new pairs are learnt, the old ones not lost."""
    day = week[1][9]
    champion, trained = day.record("champion"), day.record("train")
    heldout = day.report()["findings"]["heldout"]

    assert not day.failed, day.printed[-5000:]
    assert list(day.ends) == ["champion", *STAGES]
    assert champion.details["version"] == "3"
    assert trained.inputs["model"] == day.record("score_reference").inputs["model"] == champion.details["model"]
    assert trained.metrics["first_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert trained.metrics["loss"] < 0.9 * math.log(2)
    assert day.report()["findings"]["champion"]["version"] == "3"
    assert day.versions == ["1", "2", "3", "4"]
    assert (day.champion == "4") == (heldout["champion"]["difference"]["low"] > 0)
    card = _client(week[0].uri).get_model_version(NAME, "4")
    assert card.tags["dpo.base_model"] == f"{NAME} version 3"


def test_address_of_the_webhook_is_in_no_log_event_or_run(week: Week) -> None:
    """It is a secret: neither what tasks print nor what lies in the store or MLflow's database holds it."""
    project, days = week
    secret = b"s3cret-part"

    assert all(secret.decode() not in day.printed for day in days.values())
    files = [*project.folder.glob("events/*"), *project.folder.glob("mlflow/mlflow.db*")]
    files += [*project.folder.glob("store/**/*.json"), *project.folder.glob("mlflow/artifacts/**/*.json")]
    assert len(files) > 20
    assert [file for file in files if file.is_file() and secret in file.read_bytes()] == []
