"""MLflow model versions: only a passing report registers, and the same result never twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_train.errors import GateRefusedError, NotLearnedError

DIGEST_TAG = "dpo.report_digest"

REQUIREMENTS = ("torch>=2.11", "transformers>=5.20,<6", "safetensors", "accelerate")
"""Given to MLflow outright: what it would infer asks for torchvision."""


def check_verdict(details: Mapping[str, Any], report: Path) -> None:
    """Raises:
    NotLearnedError: on held-out pairs the policy is no better than chance.
    GateRefusedError: it learned, but a rule of the gate failed.
    """
    if not details["learned"]:
        raise NotLearnedError(
            "The policy did not learn: on held-out pairs it does not prefer the chosen answers; nothing is registered",
            expected="the lower 95 % bound of accuracy above 0.5 and a positive mean margin",
            fix=f"see {report}; then look at the data's labels, the learning rate and the number of steps",
        )
    if not details["passed"]:
        raise GateRefusedError("The gate refused the model; nothing is registered", fix=f"see the rules in {report}")


def find_version(client: Any, name: str, digest: str) -> str | None:
    """The version of a registered model that was made from this report, if there is one."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return str(found[0].version) if found else None


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """``log_model`` only knows MLflow's global address; afterwards that is again what the caller had set."""
    import mlflow

    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(registry)
        # set_tracking_uri writes the variable as well, which would then rule the next run of this process.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if variable is not None:
            os.environ["MLFLOW_TRACKING_URI"] = variable


def register_version(
    client: Any,
    uri: str,
    name: str,
    digest: str,
    *,
    alias: str,
    load: Callable[[], tuple[Any, Any]],
    run_id: str,
    tags: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> str:
    """Logs the model under a run and registers it as a version with an alias.

    Args:
        digest: of the report; a version with it is returned as it is.
        load: gives the model and its tokenizer; called only if they are needed.
        run_id: MLflow run that the model belongs to.

    Returns:
        the version.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    existing = find_version(client, name, digest)
    if existing is None:
        model, tokenizer = load()
        with _default_uri(uri), mlflow.start_run(run_id=run_id, nested=True):
            info = mlflow.transformers.log_model(
                {"model": model, "tokenizer": tokenizer},
                name="model",
                task="text-generation",
                # Given outright: MLflow would generate hundreds of tokens to find out that text goes in and comes out.
                signature=ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec("string")])),
                metadata=dict(metadata),
                pip_requirements=list(REQUIREMENTS),
                registered_model_name=name,
            )
        existing = str(info.registered_model_version)
        # Tags first, the digest last: a version without it counts as half made, and the next try makes another.
        for key, value in {**tags, DIGEST_TAG: digest}.items():
            client.set_model_version_tag(name, existing, key, value)
    client.set_registered_model_alias(name, alias, existing)
    return existing
