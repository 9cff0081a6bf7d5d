"""report and policy -> model version"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_train import registry
from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, model_digest
from dpo_train.tracking import Tracking


def register(
    config: RunConfig,
    policy: Artifact,
    report: Artifact,
    tracking: Tracking,
    *,
    run_id: str | None = None,
    output: Path | None = None,
) -> Artifact:
    """Registers the policy in MLflow if its report passed; ``record.details`` has the name and version.

    An output that is complete is believed only while the registry still has its version.

    Raises:
        NotLearnedError, GateRefusedError: the report's verdict; nothing is registered.
    """
    registry.check_verdict(report.record.details, report.path / "report.html")
    name = config.register.model_name
    content = {**to_dict(config.register), "tracking_uri": tracking.uri}
    inputs = {"report": report.record.digest, "policy": policy.record.digest, "model": model_digest(config)}

    def ensure_version() -> str:
        run = run_id or tracking.start_run("register")
        reporter = Reporter.from_environment("register")
        reporter.message(f"registering {name} in MLflow at {tracking.uri}")
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
        out.write_json("version.json", {**details, "tracking_uri": tracking.uri})
        return Summary(details=details)

    artifact = make(config, "register", content, inputs, body, output=output)
    if artifact.reused and registry.find_version(tracking.client, name, report.record.digest) is None:
        # The registry lost it (another MLflow store at the same address): the record is void.
        (artifact.path / "record.json").unlink()
        artifact = make(config, "register", content, inputs, body, output=output)
    return artifact


def _merged(config: RunConfig, policy: Artifact) -> tuple[Any, Any]:
    from dpo_train.data.tokens import load_tokenizer
    from dpo_train.model.load import merged_model

    tokenizer = load_tokenizer(model_folder(config.model.path), trust_remote_code=config.model.trust_remote_code)
    return merged_model(config.model, policy.path), tokenizer
