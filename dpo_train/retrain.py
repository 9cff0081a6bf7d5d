"""Runs that come again: what a run starts from, whether there is anything to do, and who becomes the champion.

config, registry --resolve--> "train", and the config with all that could move meanwhile nailed down
                          --> "unchanged": the champion was made of the same data
registered version, its report --settle--> refused, registered, promoted
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_train import registry, storage
from dpo_train.artifacts import Artifact, Output, Summary, local_copy
from dpo_train.config import RunConfig
from dpo_train.config.cluster import Outcome
from dpo_train.config.evaluation import NO_CHAMPION
from dpo_train.data.folder import MODEL_FOLDER
from dpo_train.describe import refusal, summary
from dpo_train.preflight import check_data, check_models, check_reach, data_digest
from dpo_train.progress import Reporter
from dpo_train.registry import CHAMPION, RegisteredVersion
from dpo_train.registry.versions import lookup
from dpo_train.report_file import read_report
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.sft import with_model_of
from dpo_train.tracking import RunLog, Tracking

DATA_TAG = "dpo.data"
"""Of a pipeline's MLflow run, and of versions: digests of the raw data. MLflow cuts a tag at ``_TAG_LENGTH``."""
OUTCOME_TAG, WHY_TAG, PROMOTED_TAG = "dpo.outcome", "dpo.why", "dpo.promoted"
CROWNED_TAG = "dpo.was_promoted"
"""Of a version that a run has made the champion. Who takes it back does not want it there again the next night."""

LOCK_SECONDS = 120.0
"""For another's promotion to end; a lease is shorter."""
POLL_SECONDS = 2.0

_TAG_LENGTH = 4000


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a pipeline's first task hands to all others."""

    decision: Literal["train", "unchanged"]
    config: RunConfig
    """Names the model to start from and the version to compare with as they are now."""
    data_digest: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What came of a run that went through to its end."""

    outcome: Outcome
    why: str
    promoted: bool | None = None
    """Whether the version is the champion now; None: nobody asked for that (``retrain.promote``)."""

    @property
    def tags(self) -> dict[str, str]:
        """For the pipeline's MLflow run."""
        promoted = {} if self.promoted is None else {PROMOTED_TAG: str(self.promoted).lower()}
        return {OUTCOME_TAG: self.outcome, WHY_TAG: self.why, **promoted}


def resolve(config: RunConfig, tracking: Tracking) -> Resolved:
    """Looks at the inputs and the champion, and decides.

    Raises:
        UserError: an input is missing.
        TrackingError: MLflow cannot be reached.
    """
    check_reach(config)
    check_data(config)
    champion = find_champion(config, tracking)
    starts_from_champion = config.retrain.start == "champion" and champion is not None
    if not starts_from_champion:
        check_models(config)
    digest = data_digest(config)
    if config.retrain.when == "new_data" and champion is not None:
        made_of = data_of(tracking, champion)
        if made_of == digest[:_TAG_LENGTH]:
            why = f"the champion, {_title(champion)}, was made of the same data: nothing is trained"
            return Resolved(decision="unchanged", config=config, data_digest=digest, why=why)
        why = "the data are not the champion's" if made_of else "what data the champion was made of is not known"
    else:
        why = "there is no champion yet" if champion is None else "retrain.when=always"
    config = nailed_down(config, tracking, champion)
    if starts_from_champion:
        check_models(config)
    return Resolved(decision="train", config=config, data_digest=digest, why=why)


def find_champion(config: RunConfig, tracking: Tracking) -> RegisteredVersion | None:
    """The version that is champion now."""
    with tracking.errors():
        return registry.champion(tracking.client, config.register.model_name, CHAMPION)


def data_of(tracking: Tracking, version: RegisteredVersion) -> str | None:
    """Digest of the raw data that a version was made of: its own tag, or that of the pipeline's run that made it."""
    if found := version.tags.get(DATA_TAG):
        return found[:_TAG_LENGTH]
    with tracking.errors():
        run_id = tracking.client.get_model_version(version.name, version.version).run_id
        if not run_id:
            return None
        tags: Mapping[str, str] = tracking.client.get_run(run_id).data.tags
        if parent := tags.get("mlflow.parentRunId"):
            tags = tracking.client.get_run(parent).data.tags
    return tags.get(DATA_TAG)


def nailed_down(config: RunConfig, tracking: Tracking, champion: RegisteredVersion | None) -> RunConfig:
    """The config for all later tasks: a champion that moves while they run changes nothing.

    Started from a champion there is no SFT: it has been through one, and another would undo what DPO did.
    """
    opponent = champion
    if config.evaluate.champion not in {None, NO_CHAMPION, CHAMPION}:
        with tracking.errors():
            opponent = registry.champion(tracking.client, config.register.model_name, str(config.evaluate.champion))
    if config.evaluate.champion not in {None, NO_CHAMPION}:
        which = NO_CHAMPION if opponent is None else opponent.version
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, champion=which))
    if config.retrain.start == "champion" and champion is not None:
        made = stored_champion(config, tracking, champion)
        config = dataclasses.replace(
            with_model_of(made.home, config), sft=dataclasses.replace(config.sft, enabled=False)
        )
    return config


def stored_champion(config: RunConfig, tracking: Tracking, version: RegisteredVersion) -> Artifact:
    """The version's model folder as an output of the store, where every task, on whatever machine, can reach it.

    ``record.details["model"]`` is its digest, by which later outputs name it, as they do with SFT's.
    """
    reporter = Reporter.from_environment("champion")
    start = time.perf_counter()

    def body(out: Output) -> Summary:
        with tracking.errors():
            folder = registry.fetch(tracking.uri, version, storage.cache_folder() / "models")
        shutil.copytree(folder, out.path / MODEL_FOLDER, copy_function=_link)
        digest = model_digest(with_model_of(str(out.path), config))
        return Summary(details={"model_name": version.name, "version": version.version, "model": digest})

    # By the place: under one name and number another registry holds another model. Its digest depends on the others.
    model = config.model
    content = {"name": version.name, "quantization": model.quantization, "precision": model.precision}
    made = make(config, "champion", content, {"version": version.place}, body, output=None)
    reporter.event(
        "end",
        address=made.address,
        path=made.home,
        reused=made.reused,
        seconds=time.perf_counter() - start,
        summary=f"starting from {summary(made)}",
        refused=None,
    )
    return made


def _link(source: str, target: str) -> None:
    """A model need not lie on one disk twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def settle(config: RunConfig, tracking: Tracking, registered: Artifact, report: Artifact) -> Settled:
    """What follows from a registration; with ``retrain.promote=if_better`` maybe a promotion. Twice is as once.

    Raises:
        LockedError: others promoted versions of this model for longer than ``LOCK_SECONDS``.
        TrackingError: MLflow does not do what it is asked.
    """
    wants = config.retrain.promote == "if_better"
    if reason := refusal(registered):
        return Settled(outcome="refused", why=reason, promoted=False if wants else None)
    name, version = registered.record.details["model_name"], registered.record.details["version"]
    if not wants:
        return Settled(outcome="registered", why=f"{name} version {version}")
    findings = read_report(report.path)["findings"]
    deadline = time.monotonic() + LOCK_SECONDS
    with tracking.errors():
        while True:
            try:
                return _promote(tracking.client, name, version, findings)
            except (registry.LockedError, registry.MovedError):
                # Another has become the champion, or is about to: then all is to be asked again.
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)


def _promote(client: Any, name: str, version: str, findings: Mapping[str, Any]) -> Settled:
    champion, ours = registry.champion(client, name, CHAMPION), lookup(client, name, version)
    title = _title(ours)
    if champion is not None and champion.version == version:
        client.set_model_version_tag(name, version, CROWNED_TAG, "true")
        return Settled(outcome="registered", why=f"{title} is the champion", promoted=True)
    is_better, why = better(ours, champion, findings)
    if not is_better:
        return Settled(outcome="registered", why=f"{title} is not promoted: {why}", promoted=False)
    registry.promote(client, name, version, instead_of=None if champion is None else champion.version)
    client.set_model_version_tag(name, version, CROWNED_TAG, "true")
    return Settled(outcome="promoted", why=f"{title} is the champion now: {why}", promoted=True)


def better(
    ours: RegisteredVersion, champion: RegisteredVersion | None, findings: Mapping[str, Any]
) -> tuple[bool, str]:
    """Whether a version may follow the champion by its report's findings, and why. Pure.

    It may if there is none, or if on the same held-out pairs it is right more often, with the whole 95 % interval.
    """
    if ours.tags.get(CROWNED_TAG) == "true":
        return False, "it was the champion before and was taken back; `dpo promote` decides"
    if champion is None:
        return True, "there was none"
    if champion.policy is not None and champion.policy == ours.policy:
        return False, f"{_title(champion)}, the champion, was made of the same policy"
    compared, paired = findings["champion"], findings["heldout"]["champion"]
    if compared is None or paired is None or compared["digest"] != champion.digest:
        with_whom = (
            "no champion (evaluate.champion)"
            if compared is None
            else f"{compared['name']} version {compared['version']}"
        )
        return False, f"its report compares it with {with_whom}, and the champion is {_title(champion)}"
    value, low, high = (paired["difference"][end] for end in ("value", "low", "high"))
    if None in {value, low, high}:
        return False, f"the difference to {_title(champion)} is not a finite number"
    measured = (
        f"accuracy {value:+.3f} ({low:+.3f} to {high:+.3f}) against {_title(champion)} on the same "
        f"{paired['difference']['n']} held-out pairs"
    )
    return low > 0, measured if low > 0 else f"{measured} is not better with the whole interval"


def _title(version: RegisteredVersion) -> str:
    return f"{version.name} version {version.version}"


def note(config: RunConfig, tracking: Tracking, run_id: str, settled: Settled) -> None:
    """Says in the pipeline's MLflow run what came of it; where MLflow is away just now, with the next stage."""
    log = RunLog.existing(tracking, local_copy(config.store), run_id)
    log.tags(settled.tags)
    if problem := log.close():
        print(problem)


def ends_here(tracking: Tracking, run_id: str, why: str) -> None:
    """Ends the MLflow run of a pipeline that has nothing to do."""
    tracking.set_tags(run_id, Settled(outcome="unchanged", why=why).tags)
    tracking.end(run_id, "FINISHED")
