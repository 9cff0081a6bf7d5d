"""A run by reference: a pipeline, a version named by its content, an experiment, and the run's arguments.

Everything is checked before anything is made; then a lookup comes before each creation, so that a second submission of
the same content uploads nothing, and one that was cut off goes on.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train.cluster.kubeflow.client import AwayError, Kubeflow, KubeflowError, TakenError, equals, messages
from dpo_train.cluster.kubeflow.package import (
    Package,
    check_arguments,
    package_of,
    with_image,
    with_secret,
    with_volumes,
    without_cache,
)
from dpo_train.cluster.kubeflow.reach import check_image, check_logins, check_reach, check_volumes
from dpo_train.config import RunConfig, to_text
from dpo_train.errors import ConfigError, RunError

CONFIG_ARGUMENT, NAME_ARGUMENT, IMAGE_ARGUMENT, OVERRIDES_ARGUMENT = "config", "run_name", "image", "overrides"
_OWN: Mapping[str, str] = {
    CONFIG_ARGUMENT: "it is the config file, as its overrides on the command line have changed it",
    NAME_ARGUMENT: "give --name",
    IMAGE_ARGUMENT: "give --image",
    OVERRIDES_ARGUMENT: "write them behind the config: `CONFIG train.beta=0.2`",
}
"""Arguments whose values have been checked, each with how it is set. Given past that, nothing would look at them."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run, complete and checked."""

    package: Package
    arguments: Mapping[str, Any]
    name: str
    """Of the run."""
    pipeline: str
    experiment: str
    service_account: str | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A version that the server has."""

    pipeline_id: str
    version_id: str
    name: str
    uploaded: bool
    """Whether it was not there before."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run that has begun."""

    run_id: str
    version: Reference


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the server has already."""

    pipeline_id: str | None = None
    version_id: str | None = None
    experiment_id: str | None = None


def prepare(
    config: RunConfig,
    package: Package,
    *,
    name: str,
    arguments: Mapping[str, Any] | None = None,
    image: str | None = None,
    experiment: str | None = None,
    service_account: str | None = None,
    cache: bool = True,
) -> Submission:
    """The config and the pipeline as what a run, or a schedule, is made of. Nothing is asked or sent.

    Args:
        arguments: of the pipeline, besides those that have a way of their own: the config with its overrides, the
            run's name, the image.
        image, experiment, service_account: instead of the config's.
        cache: False: no task may be skipped because Kubeflow has seen its inputs before.

    Raises:
        ConfigError: the cluster cannot see a place, or mount a claim; an image has no tag; an argument is unknown,
            missing or of another type, has a way of its own, or holds a login.
    """
    check_reach(config)
    check_volumes(config.cluster.volumes)
    section = config.kubeflow
    image = image or section.image
    for origin, named in {"--image or kubeflow.image": image, "cluster.image": config.cluster.image}.items():
        if named is not None:
            check_image(named, origin)
    own: dict[str, Any] = {CONFIG_ARGUMENT: to_text(config), NAME_ARGUMENT: name}
    if image is not None and IMAGE_ARGUMENT in package.parameters:
        own[IMAGE_ARGUMENT] = image
    elif image is not None:
        package = with_image(package, image)
    package = with_volumes(with_secret(package, section.secret), config.cluster.volumes)
    if not cache:
        package = without_cache(package)
    complete = _all_arguments(package, own, arguments or {})
    return Submission(
        package=package,
        arguments=complete,
        name=name,
        pipeline=section.pipeline,
        experiment=experiment or section.experiment,
        service_account=service_account or section.service_account,
    )


def _all_arguments(package: Package, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    for name in sorted(given.keys() & _OWN.keys()):
        raise ConfigError(f"The pipeline's argument {name} is not set by --argument", fix=_OWN[name])
    check_logins(given)
    complete = {**own, **given}
    check_arguments(package, complete)
    return complete


def submit(kubeflow: Kubeflow, submission: Submission, tell: Callable[[str], None] = lambda _: None) -> Submitted:
    """Starts the run.

    Args:
        tell: gets what was made on the way.

    Raises:
        KubeflowError: the server refuses; or a version of this name has other content, or the experiment is archived,
            and then nothing was made.
        RunError: the run may have begun, but the answer was lost.
    """
    reference, experiment_id = place(kubeflow, submission, tell)
    # By this text the run is found again if the answer is lost. A run's name may be another's too.
    mark = f"dpo submit {uuid.uuid4().hex}"
    body = messages.V2beta1Run(
        display_name=submission.name,
        description=mark,
        experiment_id=experiment_id,
        pipeline_version_reference=messages.V2beta1PipelineVersionReference(
            pipeline_id=reference.pipeline_id, pipeline_version_id=reference.version_id
        ),
        runtime_config=messages.V2beta1RuntimeConfig(parameters=dict(submission.arguments)),
        service_account=submission.service_account,
    )
    try:
        run_id = kubeflow.tell(kubeflow.runs.run_service_create_run, body).run_id
    except AwayError as error:
        if not error.lost:
            raise
        run_id = _find_lost(kubeflow, submission, experiment_id, mark, error)
    return Submitted(run_id=run_id, version=reference)


def place(kubeflow: Kubeflow, submission: Submission, tell: Callable[[str], None]) -> tuple[Reference, str]:
    """The version that the submission's content has on the server, and the id of its experiment; made if need be.

    Raises:
        KubeflowError: as ``submit``.
    """
    found = _look(kubeflow, submission)
    pipeline_id = found.pipeline_id or _create_pipeline(kubeflow, submission.pipeline, tell)
    version_id, uploaded = found.version_id, False
    if version_id is None:
        version_id, uploaded = _upload(kubeflow, submission, pipeline_id)
        tell(f"{'uploaded' if uploaded else 'found'} version {submission.package.version} of {submission.pipeline}")
    experiment_id = found.experiment_id or _create_experiment(kubeflow, submission.experiment, tell)
    reference = Reference(
        pipeline_id=pipeline_id, version_id=version_id, name=submission.package.version, uploaded=uploaded
    )
    return reference, experiment_id


def find_experiment(kubeflow: Kubeflow, name: str) -> Any | None:
    """The experiment of this name, as the server tells it."""
    listing = kubeflow.experiments.experiment_service_list_experiments
    return kubeflow.named(listing, "experiments", name, **kubeflow.scope)


def _look(kubeflow: Kubeflow, submission: Submission) -> _Found:
    experiment = find_experiment(kubeflow, submission.experiment)
    if experiment is not None and experiment.storage_state == "ARCHIVED":
        raise KubeflowError(
            f"The experiment {submission.experiment!r} is archived", fix="restore it in Kubeflow, or name another"
        )
    pipeline = _find_pipeline(kubeflow, submission.pipeline)
    return _Found(
        pipeline_id=pipeline and pipeline.pipeline_id,
        version_id=pipeline and _find_version(kubeflow, submission.package, pipeline.pipeline_id),
        experiment_id=experiment and experiment.experiment_id,
    )


def _find_pipeline(kubeflow: Kubeflow, name: str) -> Any | None:
    listing = kubeflow.pipelines.pipeline_service_list_pipelines
    return kubeflow.named(listing, "pipelines", name, **kubeflow.scope)


def _find_version(kubeflow: Kubeflow, package: Package, pipeline_id: str) -> str | None:
    listing = kubeflow.pipelines.pipeline_service_list_pipeline_versions
    version = kubeflow.named(listing, "pipeline_versions", package.version, pipeline_id=pipeline_id)
    if version is None:
        return None
    there = package_of(version.pipeline_spec)
    if there is None or there.canonical != package.canonical:
        raise KubeflowError(
            f"Kubeflow has a version {package.version} of this pipeline whose content is another",
            fix="somebody has given this name by hand: delete that version in Kubeflow, or set kubeflow.pipeline to "
            "another name",
        )
    return str(version.pipeline_version_id)


def _create_pipeline(kubeflow: Kubeflow, name: str, tell: Callable[[str], None]) -> str:
    body = messages.V2beta1Pipeline(
        display_name=name,
        description="Preference data to an aligned, evaluated, registered model; versions are named by their content",
        namespace=kubeflow.namespace,
    )
    try:
        made = kubeflow.tell(kubeflow.pipelines.pipeline_service_create_pipeline, body)
        tell(f"made the pipeline {name}")
    except TakenError:  # somebody was faster
        made = _find_pipeline(kubeflow, name)
        if made is None:
            raise
    return str(made.pipeline_id)


def _upload(kubeflow: Kubeflow, submission: Submission, pipeline_id: str) -> tuple[str, bool]:
    """The version's id, and whether this has uploaded it; someone else may have been faster with the same."""
    package = submission.package
    with tempfile.TemporaryDirectory(prefix="dpo-kfp-") as folder:
        file = Path(folder) / "dpo.yaml"
        file.write_text(package.text, encoding="utf-8")
        try:
            made = kubeflow.tell(
                kubeflow.uploads.upload_pipeline_version, str(file), name=package.version, pipelineid=pipeline_id
            )
            return str(made.pipeline_version_id), True
        except TakenError:
            there = _find_version(kubeflow, package, pipeline_id)
            if there is None:
                raise
            return there, False


def _create_experiment(kubeflow: Kubeflow, name: str, tell: Callable[[str], None]) -> str:
    body = messages.V2beta1Experiment(display_name=name, namespace=kubeflow.namespace)
    try:
        made = kubeflow.tell(kubeflow.experiments.experiment_service_create_experiment, body)
        tell(f"made the experiment {name}")
    except TakenError:
        made = find_experiment(kubeflow, name)
        if made is None:
            raise
    return str(made.experiment_id)


def _find_lost(kubeflow: Kubeflow, submission: Submission, experiment_id: str, mark: str, error: AwayError) -> str:
    """The run whose creation was not answered.

    Raises:
        RunError: the server cannot be asked, or has it not, or not yet.
    """
    try:
        listing = kubeflow.runs.run_service_list_runs
        for run in kubeflow.all(
            listing, "runs", experiment_id=experiment_id, filter=equals("display_name", submission.name)
        ):
            if run.description == mark:
                return str(run.run_id)
    except KubeflowError:
        pass
    raise RunError(
        f"It is not known whether the run {submission.name!r} has begun: {error}",
        fix="look with `dpo runs CONFIG --kfp` before submitting again",
    ) from error
