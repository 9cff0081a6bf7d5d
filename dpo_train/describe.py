"""What an output says of itself to people, to Kubeflow and to MLflow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig


def hand_on(artifact: Artifact, into: Any, *, page: str = "") -> None:
    """Makes an artifact of a pipeline (kfp.dsl.Artifact) stand for the output.

    Its metadata name the output; its file is the named page of the output, or says where the output lies. The file is
    Kubeflow's to keep: its launcher uploads it to the run's own root, and shows pages from there.
    """
    into.metadata.update(metadata(artifact))
    target = Path(into.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if page in artifact.record.files:
        shutil.copyfile(artifact.file(page), target)
    else:
        target.write_text(
            json.dumps({"output": artifact.home, **metadata(artifact)}, indent=1) + "\n", encoding="utf-8"
        )


def metadata(artifact: Artifact) -> dict[str, str]:
    """What a pipeline's artifact says about itself; text only, because Kubeflow turns whole numbers into floats."""
    return {"address": artifact.address, "stage": artifact.record.stage, "summary": summary(artifact)}


def summary(artifact: Artifact) -> str:
    """One line that says what a stage found."""
    record = artifact.record
    counts, metrics, details = record.counts, record.metrics, record.details
    if "summary" in details:
        return str(details["summary"])
    if record.stage == "prepare":
        splits = ", ".join(f"{counts[f'pairs/{split}']} {split}" for split in ("train", "validation", "heldout"))
        kept, unused = counts["kept_pairs"], counts["rejected"]
        return f"{counts['records']} records: {kept} pairs ({splits}), {unused} records not used"
    if record.stage == "sft" and not details["enabled"]:
        return "off"
    if record.stage == "score_reference":
        return f"{counts['pairs']} pairs, {counts['tokens']} tokens"
    if record.stage == "sweep":
        return f"{counts['trials']} trials, beta {details['beta']:g}" if counts["trials"] else "off"
    if record.stage in {"sft", "train"}:
        return f"{counts['steps']} steps, loss {metrics['first_loss']:.4f} to {metrics['loss']:.4f}"
    if record.stage == "evaluate":
        low, high = metrics["heldout/accuracy_low"], metrics["heldout/accuracy_high"]
        return f"accuracy {metrics['heldout/accuracy']:.3f} ({low:.3f} to {high:.3f})"
    return refusal(artifact) or f"{details['model_name']} version {details['version']}"


def refusal(artifact: Artifact) -> str | None:
    """Why the gate let nothing be registered, of an output of the stage register; None where something was."""
    details = artifact.record.details
    return str(details["reason"]) if details.get("registered") is False else None


def raw_data(config: RunConfig, artifact: Artifact) -> dict[str, tuple[str, str]]:
    """By name the place and the digest of each source."""
    sources = config.prepare.all_sources
    digests = [digest for name, digest in sorted(artifact.record.inputs.items(), key=_number) if _is_data(name)]
    names = [source.path.rstrip("/").rpartition("/")[2] or source.path for source in sources]
    return {
        name if names.count(name) == 1 else f"{name} ({index})": (source.path, digest)
        for index, (name, source, digest) in enumerate(zip(names, sources, digests, strict=True))
    }


def _is_data(name: str) -> bool:
    return name == "data" or name.startswith("data/")


def _number(item: tuple[str, str]) -> int:
    """``data/10`` comes after ``data/9``."""
    return int(item[0].removeprefix("data/")) if item[0].startswith("data/") else 0
