"""Runs stages: the one module that the command line and the Kubeflow components import.

    resolve(text) -> decision, run id, data, config    the pipeline's first task (resolving.py, retrain.py)
    run_stage(name, config, inputs) -> Artifact    events, a nested MLflow run, the executor of the config
    notify(text, state)                        the pipeline's last task, whatever has happened (notify.py)
    run(config) -> Result                      the whole flow in this process

An artifact travels between stages as its address in the store, so that a pipeline passes no machine path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_train import storage
from dpo_train.artifacts import Artifact, local_copy, open_artifact
from dpo_train.config import RunConfig, parse_config
from dpo_train.config.evaluation import NO_CHAMPION
from dpo_train.describe import hand_on, metadata, refusal, summary
from dpo_train.errors import GateRefusedError, StoreError
from dpo_train.launching import is_launched, run_elsewhere, with_task
from dpo_train.notify import notify
from dpo_train.preflight import check_inputs, check_store, check_tracking, use_storage
from dpo_train.progress import ENVIRONMENT_KEY, Reporter
from dpo_train.resolving import close_run, exit_code, open_run, outcome_line, resolve, told
from dpo_train.runs import RUNS, RunFolder, store_lock

__all__ = [
    "INPUTS",
    "Result",
    "check_inputs",
    "check_store",
    "check_tracking",
    "close_run",
    "executor",
    "exit_code",
    "hand_on",
    "metadata",
    "notify",
    "open_run",
    "parse_config",
    "resolve",
    "run",
    "run_stage",
    "run_step",
    "stored",
    "summary",
    "use_storage",
    "with_task",
]

if TYPE_CHECKING:
    from dpo_train.stages.evaluate import ChampionModel
    from dpo_train.stages.executor import Executor
    from dpo_train.tracking import Tracking

INPUTS: Mapping[str, tuple[str, ...]] = {
    "prepare": (),
    "sft": ("prepare",),
    "score_reference": ("sft", "prepare"),
    "sweep": ("sft", "score_reference"),
    "train": ("sft", "score_reference", "sweep"),
    "evaluate": ("sft", "score_reference", "train"),
    "register": ("sft", "train", "evaluate"),
}
"""Every stage, in order, with the stages whose outputs it reads. From ``sft`` on they all start from its model."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished flow."""

    artifacts: Mapping[str, Artifact]
    tracking_uri: str

    @property
    def metrics(self) -> Mapping[str, float]:
        """Held-out metrics, with their bounds as ``_low`` and ``_high``."""
        return self.artifacts["evaluate"].record.metrics

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.artifacts["evaluate"].file("report.html")

    @property
    def model_uri(self) -> str:
        """The registered version, for ``mlflow.transformers.load_model``."""
        return str(self.artifacts["register"].record.details["uri"])


def resolve_device(config: RunConfig) -> RunConfig:
    """Replaces ``compute.device=auto`` by what is here, so that later processes need not look again.

    Stages that are launched look where they run.
    """
    if config.compute.device != "auto" or config.cluster.launcher != "none":
        return config
    device: Literal["cpu", "cuda"] = "cpu"
    # Importing torch takes seconds; without a driver's device file there is nothing for it to find.
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists():
        from dpo_train.model.load import select_device

        device = "cuda" if select_device("auto").type == "cuda" else "cpu"
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, device=device))


def run(config: RunConfig) -> Result:
    """The whole flow in this process; complete outputs are reused. Of ``retrain.when`` nothing is asked.

    Raises:
        GateRefusedError: the run is complete, and its gate refused the model.
        DpoError: the user's mistake, or a failed stage.
    """
    from dpo_train.retrain import find_champion, nailed_down
    from dpo_train.tracking import Tracking, tracking_uri

    config = resolve_device(config)
    check_inputs(config)
    check_tracking(config)
    tracking = Tracking(config)
    config = nailed_down(config, tracking, find_champion(config, tracking))
    artifacts: dict[str, Artifact] = {}
    with session(config):
        run_id = open_run(config, config.store.rstrip("/").rpartition("/")[2])
        for stage, needed in INPUTS.items():
            inputs = {name: artifacts[name] for name in needed}
            artifacts[stage] = run_stage(stage, config, inputs, run_id=run_id)
    if reason := refusal(artifacts["register"]):
        raise GateRefusedError(reason)
    return Result(artifacts=artifacts, tracking_uri=tracking_uri(config))


@contextlib.contextmanager
def session(config: RunConfig) -> Iterator[None]:
    """Ray, started once for all stages, if the config wants it."""
    if config.compute.executor == "local" or config.cluster.launcher != "none":
        yield
        return
    from dpo_train.runtime.session import ray_session

    with ray_session():
        yield


def stored(config: RunConfig, address: str) -> Artifact:
    """The complete output at ``<stage>/<digest>`` in the store."""
    use_storage(config)
    return open_artifact(storage.join(config.store, address))


def needed(stage: str, config: RunConfig) -> tuple[str, ...]:
    """The stages that must come before: a stage run by itself does not ask for the output of an SFT that is off."""
    return tuple(name for name in INPUTS[stage] if name != "sft" or config.sft.enabled)


def with_sft_model(config: RunConfig, made: Artifact) -> RunConfig:
    """The config whose model is the one that SFT has made, so that no later stage needs to know where it comes from.

    Raises:
        StoreError: the output says of itself that SFT was on, or off, unlike the config.
    """
    if made.record.details["enabled"] != config.sft.enabled:
        raise StoreError(
            f"{made.home} was made with another sft.enabled",
            got=made.record.details["enabled"],
            expected=config.sft.enabled,
            fix="name the output of sft under this config, or run its stage again",
        )
    if not config.sft.enabled:
        return config
    from dpo_train.stages.sft import with_model_of

    return with_model_of(made.home, config)


def run_stage(
    stage: str,
    config: RunConfig,
    inputs: Mapping[str, Artifact],
    *,
    run_id: str | None = None,
    output: Path | str | None = None,
) -> Artifact:
    """One stage, with its events and its MLflow run.

    Args:
        inputs: artifacts by the name of their stage, as ``INPUTS`` says.
        run_id: MLflow's parent run; without, the stage's run stands alone.
        output: a folder to use instead of the store's address.

    Raises:
        DpoError: what the stage raised; the parent run is then FAILED.
    """
    reporter = Reporter.from_environment(stage)
    if is_launched(stage, config):
        with told(reporter):
            return run_elsewhere(stage, config, inputs, run_id=run_id, output=output)
    config = resolve_device(config)
    reporter.event("start")
    start = time.perf_counter()
    use_storage(config)
    with store_lock(local_copy(config.store), alone=False), told(reporter), _events(config, run_id) as events:
        on = with_sft_model(config, inputs["sft"]) if "sft" in inputs else config
        artifact, what_came = _tracked(stage, on, inputs, run_id, output, events, base=config.model.path)
        _tell_end(Reporter(str(events), stage), artifact, start, what_came)
    return artifact


def run_step(name: str, config: RunConfig, body: Callable[[Executor], Artifact]) -> Artifact:
    """Work that makes an output and is no arrow of the flow, with its events."""
    reporter, start = Reporter.from_environment(name), time.perf_counter()
    reporter.event("start")
    use_storage(config)
    with store_lock(local_copy(config.store), alone=False), told(reporter):
        artifact = body(executor(config))
        what_came = summary(artifact)
    _tell_end(reporter, artifact, start, what_came)
    return artifact


def _tell_end(reporter: Reporter, artifact: Artifact, start: float, what_came: str) -> None:
    reporter.event(
        "end",
        address=artifact.address,
        path=artifact.home,
        reused=artifact.reused,
        seconds=time.perf_counter() - start,
        summary=what_came,
        refused=refusal(artifact),
    )


def _tracked(
    stage: str,
    config: RunConfig,
    inputs: Mapping[str, Artifact],
    run_id: str | None,
    output: Path | str | None,
    events: Path,
    *,
    base: str,
) -> tuple[Artifact, str]:
    """The stage within its MLflow run, and what came of it in a line."""
    from dpo_train import retrain
    from dpo_train.tracking import Tracking
    from dpo_train.tracking.stage import tracked

    tracking, settled = Tracking(config), None
    with tracked(config, tracking, stage, run_id, events) as body:
        artifact = body.artifact = _call(stage, config, inputs, tracking, body.run_id, output, base=base)
        if stage == "register":
            settled = retrain.settle(config, tracking, artifact, inputs["evaluate"])
    if settled is None:
        return artifact, summary(artifact)
    print(outcome_line(settled.outcome, settled.why), flush=True)
    if run_id is not None:
        retrain.note(config, tracking, run_id, settled)
    return artifact, settled.why


def _call(
    stage: str,
    config: RunConfig,
    inputs: Mapping[str, Artifact],
    tracking: Tracking,
    stage_run: str | None,
    output: Path | str | None,
    *,
    base: str,
) -> Artifact:
    """``base``: the model before SFT, for the model card."""
    from dpo_train import stages

    on = executor(config)
    calls: dict[str, Callable[..., Artifact]] = {
        "prepare": functools.partial(stages.prepare, config, on),
        "sft": lambda **more: stages.sft(config, inputs["prepare"], on, **more),
        "score_reference": lambda **more: stages.score_reference(config, inputs["prepare"], on, **more),
        "sweep": lambda **more: stages.sweep(config, inputs["score_reference"], on, **more),
        "train": lambda **more: stages.train(_as_swept(config, inputs), inputs["score_reference"], on, **more),
        "evaluate": lambda **more: stages.evaluate(
            config,
            inputs["score_reference"],
            inputs["train"],
            on,
            champion=_champion(config, tracking, inputs["train"]),
            **more,
        ),
        "register": lambda **more: stages.register(
            config, inputs["train"], inputs["evaluate"], tracking, base=base, run_id=stage_run, **more
        ),
    }
    return calls[stage](output=output)


def executor(config: RunConfig) -> Executor:
    """Who does the heavy part, as ``compute.executor`` says."""
    if config.compute.executor == "local":
        from dpo_train.stages.executor import InProcess

        return InProcess()
    from dpo_train.runtime.executor import RayExecutor

    return RayExecutor(config.compute)


def _as_swept(config: RunConfig, inputs: Mapping[str, Artifact]) -> RunConfig:
    """The config with what the sweep has chosen, on the very pairs that are trained on."""
    if "sweep" not in inputs:
        return config
    from dpo_train.stages.common import check_made_from
    from dpo_train.stages.sweep import chosen_config

    choice = inputs["sweep"]
    if choice.record.counts["trials"]:
        check_made_from(choice, "scored", inputs["score_reference"])
    return chosen_config(config, choice)


def _champion(config: RunConfig, tracking: Tracking, policy: Artifact) -> ChampionModel | None:
    """The registered version to compare with.

    A policy that has become the champion meanwhile is compared with the champion before it, as it was at first: run
    again, the same config finds its report and its version.

    Raises:
        UserError: ``evaluate.champion`` names a version that does not exist.
    """
    if config.evaluate.champion in {None, NO_CHAMPION}:
        return None
    from dpo_train import registry
    from dpo_train.findings import Champion
    from dpo_train.stages.evaluate import ChampionModel

    name = config.register.model_name
    with tracking.errors():
        found = registry.champion(tracking.client, name, config.evaluate.champion)
        if found is not None and found.policy == policy.record.digest:
            found = registry.champion_before(tracking.client, name)
    if found is None or found.policy == policy.record.digest:
        return None
    return ChampionModel(
        about=Champion(name=name, version=found.version, digest=found.digest),
        fetch=lambda: registry.fetch(tracking.uri, found, storage.cache_folder() / "models"),
    )


@contextlib.contextmanager
def _events(config: RunConfig, run_id: str | None) -> Iterator[Path]:
    """The events file of this run: the command's, or for a notebook or a cluster's task one in the store."""
    if path := os.environ.get(ENVIRONMENT_KEY):
        yield Path(path)
        return
    store = local_copy(config.store)
    folder = RunFolder(store / RUNS / run_id) if run_id else RunFolder.create(store)
    folder.path.mkdir(parents=True, exist_ok=True)
    os.environ[ENVIRONMENT_KEY] = str(folder.events)
    try:
        yield folder.events
    finally:
        del os.environ[ENVIRONMENT_KEY]
