"""Registered versions: made from a passing report, found by alias or number, fetched as a model folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train.data.folder import MODEL_FOLDER
from dpo_train.disk import locked as file_locked
from dpo_train.errors import GateRefusedError, NotLearnedError, UserError
from dpo_train.registry.layout import Package, log_package
from dpo_train.registry.lock import ABSENT, error_code, kept_variables, locked

CHAMPION = "champion"

DIGEST_TAG = "dpo.report_digest"
POLICY_TAG = "dpo.policy"
PASSED_TAG = "dpo.passed"

WAIT_SECONDS = 300.0
"""For another's registration or promotion to end; each holds the lock for a few requests."""


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version as the registry knows it."""

    name: str
    version: str
    place: str
    """Digest of where its files lie and when it was made: another version has another, also if all is set up anew."""
    tags: Mapping[str, str]

    @property
    def policy(self) -> str | None:
        """Digest of the policy that it was made from, if it was made here."""
        return self.tags.get(POLICY_TAG)

    @property
    def digest(self) -> str:
        """What it stands under in the identity of what is made with it."""
        return self.policy or self.place

    @property
    def uri(self) -> str:
        """For MLflow's own ``load_model``."""
        return f"models:/{self.name}/{self.version}"


def check_verdict(verdict: Mapping[str, Any], report: Path) -> None:
    """What may be registered, by the verdict of report.json.

    Raises:
        NotLearnedError: on held-out pairs the policy is no better than chance.
        GateRefusedError: it learned, but a rule of the gate did not pass.
    """
    if not verdict["learned"]:
        raise NotLearnedError(
            "The policy did not learn: on held-out pairs it does not prefer the chosen answers; nothing is registered",
            expected="the lower 95 % bound of accuracy above 0.5 and a positive mean margin",
            fix=f"see {report}; then look at the data's labels, the learning rate and the number of steps",
        )
    if not verdict["passed"]:
        held = [rule for rule in verdict["rules"] if rule["outcome"] in {"failed", "undecided"}]
        raise GateRefusedError(
            "The gate refused the model; nothing is registered",
            got="; ".join(f"{rule['rule']} {rule['outcome']}" for rule in held),
            fix=f"see the rules in {report}",
        )


def find_version(client: Any, name: str, digest: str) -> str | None:
    """The version of a registered model that was made from this report, if there is one; of several the first."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return str(min(int(version.version) for version in found)) if found else None


def existing(client: Any, name: str) -> list[RegisteredVersion]:
    """All versions of a registered model, the first one first."""
    found = client.search_model_versions(f"name = '{name}'")
    return [_version(one) for one in sorted(found, key=lambda one: int(one.version))]


def champion(client: Any, name: str, which: str) -> RegisteredVersion | None:
    """The version behind an alias or number; None where ``which`` is "champion" and there is none.

    Raises:
        UserError: there is no such version, and it was asked for by name.
    """
    try:
        return lookup(client, name, which)
    except UserError:
        if which == CHAMPION:
            return None
        raise


def lookup(client: Any, name: str, which: str) -> RegisteredVersion:
    """The version behind an alias or number.

    Raises:
        UserError: there is none; the message names what there is.
    """
    try:
        model = client.get_registered_model(name)
    except Exception as error:
        if error_code(error) not in ABSENT:
            raise
        raise UserError(
            f"There is no registered model {name!r}", fix="register one (`dpo run`), or check register.model_name"
        ) from None
    wanted = str(model.aliases.get(which, which))
    versions = existing(client, name)
    for version in versions:
        if version.version == wanted:
            return version
    numbers = ", ".join(version.version for version in versions) or "none"
    aliases = ", ".join(f"{alias} ({number})" for alias, number in sorted(model.aliases.items())) or "none"
    raise UserError(
        f"{name} has no version {which!r}", got=f"versions: {numbers}; aliases: {aliases}", fix="name one of these"
    )


def _version(found: Any) -> RegisteredVersion:
    place = f"{found.name}\0{found.version}\0{found.source}\0{found.creation_timestamp}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:32]
    return RegisteredVersion(name=found.name, version=str(found.version), place=digest, tags=dict(found.tags))


def register_version(
    client: Any,
    uri: str,
    name: str,
    digest: str,
    *,
    alias: str,
    package: Package,
    run_id: str,
    tags: Mapping[str, str],
) -> str:
    """Logs the model under a run and registers it as a version with an alias.

    Cut short before the version is there, nothing but a logged model of the run is left; cut short before its alias,
    the next call finds the version by its report and gives it the alias. Of two calls at once for one report the
    second takes the first one's version.

    Args:
        digest: of the report; a version with it is returned as it is.
        package: what the version holds; written only if it is needed.
        run_id: MLflow run that the model belongs to.

    Returns:
        the version.
    """
    version = find_version(client, name, digest)
    if version is None:
        with default_uri(uri):
            model_id = log_package(package, run_id)
            with locked(client, name, wait_seconds=WAIT_SECONDS) as check:
                version = find_version(client, name, digest)
                if version is None:
                    check()
                    version = _create(client, name, model_id, digest, tags, package.description)
    client.set_registered_model_alias(name, alias, version)
    return version


def _create(client: Any, name: str, model_id: str, digest: str, tags: Mapping[str, str], description: str) -> str:
    """A version with all its tags, in one request."""
    import mlflow

    made = mlflow.register_model(f"models:/{model_id}", name, tags={**tags, DIGEST_TAG: digest})
    # A request whose answer was lost is sent again and makes a second one; all later calls find the first.
    version = find_version(client, name, digest) or str(made.version)
    client.update_model_version(name, version, description=description)
    return version


def fetch(uri: str, version: RegisteredVersion, cache: Path) -> Path:
    """The version as a model folder with weights, config and tokenizer, downloaded once; it is complete or absent.

    Args:
        cache: holds a folder for each version.

    Raises:
        UserError: the version holds no Hugging Face model.
    """
    import mlflow

    folder = cache / f"version-{version.place[:16]}"
    with file_locked(folder):
        if folder.is_dir():
            return folder
        with default_uri(uri), tempfile.TemporaryDirectory(dir=cache) as scratch:
            files = {Path(file.path).name for file in mlflow.artifacts.list_artifacts(f"{version.uri}/{MODEL_FOLDER}")}
            if "config.json" not in files:
                raise UserError(
                    f"{version.name} version {version.version} holds no model that can be compared with",
                    got=f"{len(files)} files in its folder {MODEL_FOLDER}/",
                    expected="config.json and weights, as `dpo register` writes them",
                )
            made = Path(mlflow.artifacts.download_artifacts(f"{version.uri}/{MODEL_FOLDER}", dst_path=scratch))
            if "tokenizer_config.json" not in files:  # where MLflow itself keeps it
                place = f"{version.uri}/components/tokenizer"
                shutil.copytree(mlflow.artifacts.download_artifacts(place, dst_path=scratch), made, dirs_exist_ok=True)
            made.rename(folder)
    return folder


@contextmanager
def default_uri(uri: str) -> Iterator[None]:
    """Much of MLflow only knows its global address; afterwards that is again what the caller had set."""
    import mlflow
    from mlflow.tracking._model_registry import utils as of_registry
    from mlflow.tracking._tracking_service import utils as of_tracking

    # Not by the getters: what was not set must follow the environment again, and the registry the tracking.
    tracking, registry = of_tracking._tracking_uri, of_registry._registry_uri
    # The setters write the variables as well, which would then rule the next run of this process.
    with kept_variables("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_registry_uri(registry)
