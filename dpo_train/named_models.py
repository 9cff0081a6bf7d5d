"""A project's models by the names that people use.

reference             the model before its training: `model`, or what SFT made of it
policy                the output of a training
champion, challenger, 3, ...    a registered version of register.model_name, by alias or number
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dpo_train import registry, storage
from dpo_train.artifacts import Artifact, complete_below, open_artifact
from dpo_train.config import ModelConfig, RunConfig
from dpo_train.errors import ConfigError, StoreError, UserError
from dpo_train.registry.versions import lookup
from dpo_train.stages.common import model_digest
from dpo_train.stages.sft import with_model_of
from dpo_train.tracking import Tracking

REFERENCE, POLICY = "reference", "policy"


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model that can be loaded."""

    name: str
    about: str
    """Which one that is, in words."""
    digest: str
    """Equal where two names mean the same model: a registered version and the policy that it was made from."""
    model: ModelConfig
    weights: Path | None = None
    """Output folder of a training, where it is not the model as it lies in its folder."""


def find(config: RunConfig, name: str, policy: Artifact | None = None) -> NamedModel:
    """The model of this name.

    Args:
        policy: output of a training, for "policy" and its reference; default: the newest one of the store.

    Raises:
        UserError: there is none.
    """
    if name not in {REFERENCE, POLICY}:
        return registered(config, name)
    trained = policy or newest_policy(config)
    if name == POLICY:
        if trained is None:
            raise StoreError(f"Nothing was trained yet in {config.store}", fix="`dpo train` makes a policy")
        return of_training(config, trained)
    model = _untrained(config) if trained is None else starting_model(config, trained)
    return NamedModel(name=REFERENCE, about=model.path, digest=f"{REFERENCE} {model.path}", model=model)


def of_training(config: RunConfig, policy: Artifact) -> NamedModel:
    """The policy that a training left."""
    model = starting_model(config, policy)
    return NamedModel(name=POLICY, about=policy.home, digest=policy.record.digest, model=model, weights=policy.path)


def registered(config: RunConfig, which: str) -> NamedModel:
    """A registered version, downloaded once.

    Raises:
        UserError: there is no such version.
        TrackingError: MLflow cannot be reached.
    """
    tracking = Tracking(config)
    with tracking.errors():
        found = lookup(tracking.client, config.register.model_name, which)
        folder = registry.fetch(tracking.uri, found, storage.cache_folder() / "models")
    return NamedModel(
        name=which,
        about=f"{found.name} version {found.version}",
        digest=found.digest,
        model=replace(config.model, path=str(folder), adapter=None, quantization=None),
    )


def newest_policy(config: RunConfig) -> Artifact | None:
    """The newest output of a training in the store; at s3:// only where there is no other.

    Raises:
        StoreError: there are several, of which none can be told to be the newest.
    """
    homes = complete_below(storage.join(config.store, "train"))
    if storage.is_remote(config.store) and len(homes) > 1:
        raise StoreError(f"There are several policies in {config.store}", got=", ".join(homes), fix="name one")
    if not storage.is_remote(config.store):
        homes.sort(key=lambda home: (Path(home) / "record.json").stat().st_mtime_ns)
    return open_artifact(homes[-1], "train") if homes else None


def starting_model(config: RunConfig, policy: Artifact) -> ModelConfig:
    """The model that a policy was trained from, which is its reference.

    Raises:
        ConfigError: it is neither the config's nor one that SFT made, or that was champion, in its store.
    """
    wanted = policy.record.inputs["model"]
    homes = [home for stage in ("sft", "champion") for home in complete_below(storage.join(config.store, stage))]
    for home in homes:
        if open_artifact(home).record.details.get("model") == wanted:
            return with_model_of(home, config).model
    if model_digest(config) != wanted:
        raise ConfigError(
            f"{policy.home} was trained from another model than {config.model.path}",
            expected=f"the model with digest {wanted}",
            fix="give the config that it was trained with, its model.precision as well",
        )
    return config.model


def _untrained(config: RunConfig) -> ModelConfig:
    """What a training would start from now."""
    if not config.sft.enabled:
        return config.model
    raise UserError("The reference is not there yet: sft.enabled, and nothing was trained", fix="run `dpo train` first")
