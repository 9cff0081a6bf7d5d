"""A policy and a report as the stages before the registration make them, without the training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dpo_train.artifacts import Artifact, Output, Summary, produce
from dpo_train.config import RunConfig
from dpo_train.data.tokens import load_tokenizer
from dpo_train.findings import (
    Estimate,
    Findings,
    LengthBias,
    Outcome,
    Paired,
    RuleResult,
    SetFindings,
    Verdict,
)
from dpo_train.model.load import load_policy, save_policy
from dpo_train.stages.common import model_digest

BETA = 0.1


def made_policy(config: RunConfig, *, lora: bool = True, scored: str = "0123456789abcdef") -> Artifact:
    """Adapters (or all weights) that have moved from where they start, so that the policy is not its reference."""
    inputs = {"scored": scored, "model": model_digest(config)}

    def body(out: Output) -> Summary:
        section = config.train.lora if lora else None
        policy = load_policy(config.model, device=torch.device("cpu"), lora=section, trainable=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        save_policy(policy, out.path, load_tokenizer(Path(config.model.path)))
        return Summary(details={"beta": BETA})

    target = Path(config.store) / "train" / ("adapters" if lora else "whole")
    return produce("train", {"loss": "sigmoid", "beta": BETA, "lora": lora}, inputs, target, body)


def made_report(config: RunConfig, policy: Artifact, *, outcome: Outcome = "passed", learned: bool = True) -> Artifact:
    """A report about the policy: accuracy 0.9 (0.8 to 0.95, n = 60), and one rule with the outcome."""
    verdict = Verdict(
        learned=learned,
        passed=learned and outcome == "passed",
        rules=(RuleResult(rule="accuracy", outcome=outcome, limit="above 0.5", found=estimate(0.9, 0.8, 0.95)),),
    )

    def body(out: Output) -> Summary:
        content = {
            "schema_version": 2,
            "findings": dataclasses.asdict(findings()),
            "verdict": dataclasses.asdict(verdict),
            "samples": [],
            "identity": {},
        }
        out.write_json("report.json", content)
        (out.path / "report.html").write_text("<!doctype html>")
        return Summary(details={"learned": verdict.learned, "passed": verdict.passed, "beta": BETA})

    inputs = {"policy": policy.record.digest}
    target = Path(config.store) / "evaluate" / f"{policy.record.digest}-{outcome}-{learned}"
    return produce("evaluate", {"outcome": outcome, "learned": learned}, inputs, target, body)


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=60)


def findings() -> Findings:
    heldout = SetFindings(
        name="all", is_trained_on=True, accuracy=estimate(0.9, 0.8, 0.95), margin=estimate(0.3, 0.2, 0.4),
        chosen_reward=estimate(0.2, 0.1, 0.3), rejected_reward=estimate(-0.1, -0.2, 0.0),
        calibration_error=estimate(0.1, 0.0, 0.2), reliability=(), by_origin=(), by_length=(), by_strength=(),
        length_bias=LengthBias(
            correlation=estimate(0.0, -0.1, 0.1), prefers_longer=estimate(0.5, 0.4, 0.6),
            data_prefers_longer=estimate(0.5, 0.4, 0.6), chosen_longer=None, chosen_shorter=None,
        ),
        likelihood=Paired(difference=estimate(0.1, 0.0, 0.2), p_value=0.04, better=9, worse=3),
    )  # fmt: skip
    return Findings(beta=BETA, heldout=heldout, notes=("no answers were sampled",))


def read_card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def json_files(folder: Path) -> dict[str, Any]:
    """Every JSON below the folder, by its path there."""
    found = sorted(folder.rglob("*.json"))
    return {str(file.relative_to(folder)): json.loads(file.read_text(encoding="utf-8")) for file in found}
