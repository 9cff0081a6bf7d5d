"""report and policy -> model version"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_train import registry
from dpo_train.artifacts import Artifact, Output, Summary, void
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.progress import Reporter
from dpo_train.stages.common import check_made_from, make, model_digest
from dpo_train.tracking import Tracking, redacted


def register(
    config: RunConfig,
    policy: Artifact,
    report: Artifact,
    tracking: Tracking,
    *,
    run_id: str | None = None,
    output: Path | str | None = None,
) -> Artifact:
    """Registers the policy in MLflow if its report passed; ``record.details`` has the name and version.

    An output that is complete is believed only while the registry still has its version.

    Raises:
        StoreError: the report is about another policy.
        NotLearnedError, GateRefusedError: the report's verdict; nothing is registered.
    """
    check_made_from(report, "policy", policy)
    registry.check_verdict(report.record.details, report.path / "report.html")
    name = config.register.model_name
    content = {**to_dict(config.register), "tracking_uri": redacted(tracking.uri)}
    inputs = {"report": report.record.digest, "policy": policy.record.digest, "model": model_digest(config)}

    def ensure_version() -> str:
        run = run_id or tracking.start_run("register")
        Reporter.from_environment("register").message(f"registering {name} in MLflow at {redacted(tracking.uri)}")
        with tracking.errors():
            version = registry.register_version(
                tracking.client,
                tracking.uri,
                name,
                report.record.digest,
                alias=config.register.alias,
                load=lambda: _merged(config, policy),
                run_id=run,
                tags={f"dpo.{key}": value for key, value in inputs.items()},
                metadata={"beta": policy.record.details["beta"], "metrics": dict(report.record.metrics)},
            )
        if run_id is None:
            tracking.end(run, "FINISHED")
        return version

    def body(out: Output) -> Summary:
        version = ensure_version()
        details = {"model_name": name, "version": version, "uri": f"models:/{name}/{version}"}
        out.write_json("version.json", {**details, "tracking_uri": redacted(tracking.uri)})
        return Summary(details=details)

    artifact = make(config, "register", content, inputs, body, output=output)
    with tracking.errors():
        found = registry.find_version(tracking.client, name, report.record.digest) if artifact.reused else None
    if artifact.reused and found != artifact.record.details["version"]:
        # The registry lost it, or holds it under another number: the record is void.
        void(artifact)
        artifact = make(config, "register", content, inputs, body, output=output)
    return artifact


def _merged(config: RunConfig, policy: Artifact) -> tuple[Any, Any]:
    from dpo_train.data.tokens import load_tokenizer
    from dpo_train.model.load import merged_model

    tokenizer = load_tokenizer(model_folder(config.model.path), trust_remote_code=config.model.trust_remote_code)
    return merged_model(config.model, policy.path), tokenizer
