"""report and policy -> model version"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_train import registry, storage
from dpo_train.artifacts import Artifact, Output, Summary, open_artifact, void
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.folder import MODEL_FOLDER, model_folder
from dpo_train.data.shards import Split
from dpo_train.describe import raw_data, summary
from dpo_train.errors import ConfigError, GateRefusedError, StoreError
from dpo_train.evaluate.samples import turn_ends
from dpo_train.progress import Reporter
from dpo_train.report_file import REPORT_HTML, read_report
from dpo_train.stages.common import check_made_from, make, model_digest
from dpo_train.stages.prepare_inputs import chat_template
from dpo_train.tracking import Tracking, redacted


def register(
    config: RunConfig,
    policy: Artifact,
    report: Artifact,
    tracking: Tracking,
    *,
    base: str | None = None,
    run_id: str | None = None,
    output: Path | str | None = None,
) -> Artifact:
    """Registers the policy in MLflow if its report passed; ``record.details`` has the name and version.

    A report that a rule refused makes a complete output too, with ``registered: False`` and the ``reason``. An output
    that is complete is believed only while the registry still has its version.

    Args:
        base: the model that the model card names, where ``model.path`` is what an earlier stage made of it.

    Raises:
        StoreError: the report is about another policy.
        ConfigError: the policy was trained with another model or chat template than the config's.
        NotLearnedError: on held-out pairs the policy is no better than chance.
    """
    check_made_from(report, "policy", policy)
    if config.register.alias == registry.CHAMPION:
        raise ConfigError(
            "A version becomes the champion by `dpo promote` alone, which one can go back from",
            got=f"register.alias={registry.CHAMPION}",
            fix="set another register.alias, e.g. challenger",
        )
    name = config.register.model_name
    section = {**to_dict(config.register), "tracking_uri": redacted(tracking.uri)}
    content = read_report(report.path)
    inputs = {"report": report.record.digest, "policy": policy.record.digest, "model": model_digest(config)}
    _check_trained_with(config, policy, inputs["model"])
    try:
        registry.check_verdict(content["verdict"], report.file(REPORT_HTML))
    except GateRefusedError as refusal:
        details = {"registered": False, "reason": str(refusal), "model_name": name}
        return make(config, "register", section, inputs, lambda _: Summary(details=details), output=output)

    def body(out: Output) -> Summary:
        version = _ensure_version(
            config, policy, report, _card(config, policy, report, content, base or config.model.path), tracking, run_id
        )
        details = {"registered": True, "model_name": name, "version": version, "uri": f"models:/{name}/{version}"}
        out.write_json("version.json", {**details, "tracking_uri": redacted(tracking.uri)})
        return Summary(details=details)

    artifact = make(config, "register", section, inputs, body, output=output)
    with tracking.errors():
        found = registry.find_version(tracking.client, name, report.record.digest) if artifact.reused else None
    if artifact.reused and found != artifact.record.details["version"]:
        # The registry lost it, or holds it under another number: the record is void.
        void(artifact)
        artifact = make(config, "register", section, inputs, body, output=output)
    return artifact


def _check_trained_with(config: RunConfig, policy: Artifact, digest: str) -> None:
    """The config's model, whose digest is given, and its chat template go into the version with the policy.

    Raises:
        ConfigError: the policy was trained with another.
    """
    fix = "give the config that it was trained with, its model.precision as well"
    if policy.record.inputs["model"] != digest:
        raise ConfigError(
            f"{policy.home} was trained from another model than {config.model.path}",
            got=f"the digest {digest}",
            expected=policy.record.inputs["model"],
            fix=fix,
        )
    data = _data(config, policy)
    if data is None:
        return
    for name, now in {"template": config.prepare.template, "chat_template": chat_template(config)}.items():
        if data.record.config[name] != now:
            raise ConfigError(f"{policy.home} was trained on pairs with another prepare.{name} than this", fix=fix)


def _ensure_version(
    config: RunConfig, policy: Artifact, report: Artifact, card: registry.Card, tracking: Tracking, run_id: str | None
) -> str:
    name = config.register.model_name
    run = run_id or tracking.start_run("register")
    tell = Reporter.from_environment("register").message
    tell(f"registering {name} in MLflow at {redacted(tracking.uri)}")
    with tracking.errors():
        version = registry.register_version(
            tracking.client,
            tracking.uri,
            name,
            report.record.digest,
            alias=config.register.alias,
            package=_package(config, policy, card, tell),
            run_id=run,
            tags=_tags(card, policy, report),
        )
    if run_id is None:
        tracking.end(run, "FINISHED")
    return version


def _package(config: RunConfig, policy: Artifact, card: registry.Card, tell: Callable[[str], None]) -> registry.Package:
    from dpo_train.data.tokens import load_tokenizer

    folder = model_folder(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    if own := chat_template(config):
        tokenizer.chat_template = own

    def write(root: Path) -> None:
        from dpo_train.model.export import export_policy

        export_policy(config.model, policy.path, root, tokenizer, end_ids=answer_ends(config, policy, tell))
        for file in registry.licence_files(folder):
            shutil.copy(file, root / MODEL_FOLDER)
        (root / MODEL_FOLDER / "README.md").write_text(registry.card_text(card), encoding="utf-8")

    return registry.Package(
        name=config.register.model_name,
        write=write,
        tokenizer=tokenizer,
        chat=card.chat,
        max_new_tokens=config.prepare.max_answer_tokens,
        description=f"{registry.accuracy_line(card.report)}; beta {card.beta:g}; all else in {MODEL_FOLDER}/README.md",
        metadata={"beta": card.beta, "base_model": card.base_model},
    )


def answer_ends(config: RunConfig, policy: Artifact, tell: Callable[[str], None]) -> tuple[int, ...]:
    """The tokens that end answers in the policy's pairs; none where these are not in the store, which is told."""
    try:
        scored = open_artifact(storage.join(config.store, "score_reference", policy.record.inputs["scored"]))
    except StoreError:
        tell(f"the pairs of {policy.home} are not in {config.store}: answers end at the tokenizer's end token alone")
        return ()
    return turn_ends(Split(scored, "heldout").table(["chosen_ids", "truncated_chosen"]))


def _card(
    config: RunConfig, policy: Artifact, report: Artifact, content: Mapping[str, Any], base: str
) -> registry.Card:
    folder = model_folder(base)
    data = _data(config, policy)
    sources = raw_data(config, data) if data else {}
    return registry.Card(
        name=config.register.model_name,
        base_model=_name(base),
        licence=registry.find_licence(folder, config.register.licence),
        data={name: digest for name, (_, digest) in sources.items()},
        counts=data.record.counts if data else {},
        training={key: value for key, value in policy.record.config.items() if value is not None},
        beta=float(policy.record.details["beta"]),
        report=content,
        chat=config.prepare.template == "chat",
        identity={"policy": policy.record.digest, "report": report.record.digest, "base model": model_digest(config)},
    )


def _name(path: str) -> str:
    """A hub name as it is; of a folder its last part, for where it lies here is nobody's business.

    A champion that was started from is named as the registry names it.
    """
    home, _, folder = path.rstrip("/").rpartition("/")
    if folder == MODEL_FOLDER and storage.name_of(home.rpartition("/")[0]) == "champion":
        with contextlib.suppress(StoreError):
            return summary(open_artifact(home, "champion"))
    return path.rstrip("/").rpartition("/")[2] if storage.is_remote(path) or Path(path).is_dir() else path


def _data(config: RunConfig, policy: Artifact) -> Artifact | None:
    """The prepared pairs that the policy was trained on; None: they lie outside the store, where a person put them."""
    try:
        scored = open_artifact(storage.join(config.store, "score_reference", policy.record.inputs["scored"]))
        return open_artifact(storage.join(config.store, "prepare", scored.record.inputs["pairs"]))
    except StoreError:
        return None


def _tags(card: registry.Card, policy: Artifact, report: Artifact) -> dict[str, str]:
    """What can be searched for in the registry, and what a promotion asks for."""
    accuracy = card.report["findings"]["heldout"]["accuracy"]
    numbers = {f"dpo.accuracy_{bound}": accuracy[bound] for bound in ("low", "high", "n")}
    return {
        registry.PASSED_TAG: "true",
        registry.POLICY_TAG: policy.record.digest,
        "dpo.model": card.identity["base model"],
        "dpo.report": report.address,
        # MLflow's limit of a tag; a run that comes again compares as much.
        "dpo.data": "-".join(card.data.values())[:4000],
        "dpo.beta": f"{card.beta:g}",
        "dpo.base_model": card.base_model,
        "dpo.licence": card.licence,
        "dpo.accuracy": str(accuracy["value"]),
        **{name: str(value) for name, value in numbers.items()},
    }
