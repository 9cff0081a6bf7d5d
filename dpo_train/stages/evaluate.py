"""policy, held-out pairs and the champion -> report with a verdict

pairs    --policy, champion-->             log-probs --preference.measure--> accuracy, calibration, length bias, sets
prompts  --policy, reference, champion-->  answers   --samples-->            lengths, repetition, KL
answers  --judge-->                        win rates
all of it --gate.judge--> verdict ; report.json, report.html, answers.parquet, margins.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_train.artifacts import Artifact, Output, Summary, discard
from dpo_train.config import EvaluateConfig, RunConfig, to_dict
from dpo_train.data.shards import Split, lengths, list_sums
from dpo_train.errors import ConfigError, DataError
from dpo_train.evaluate import judge as judging
from dpo_train.evaluate import report as reporting
from dpo_train.evaluate.gate import judge
from dpo_train.evaluate.preference import Heldout, Preferences, measure
from dpo_train.evaluate.samples import turn_ends
from dpo_train.evaluate.statistics import Floats
from dpo_train.findings import Champion, Findings, Verdict
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.report_file import SCHEMA_VERSION
from dpo_train.stages.check import check_rows
from dpo_train.stages.common import check_made_from, check_same_dtype, check_same_model, make, model_digest
from dpo_train.stages.evaluate_models import CHAMPION, WORK, Asked, shared_copy
from dpo_train.stages.evaluate_samples import Samples, answered
from dpo_train.stages.executor import Executor
from dpo_train.stages.prepare_inputs import set_names
from dpo_train.stages.score_reference import join_scores
from dpo_train.stages.with_model import PARTS

MIN_GROUPS = 10
"""Groups are what the intervals resample; over fewer a bootstrap sees too little spread."""

_COLUMNS = (
    *("pair_id", "group", "dataset", "origin", "strength", "prompt", "tools"),
    *("chosen", "chosen_extra", "rejected", "rejected_extra", "prompt_ids", "chosen_ids", "rejected_ids"),
    "truncated_chosen",
    *("reference_chosen_logps", "reference_rejected_logps"),
)
"""What is measured: of a ranking the best answer against the second."""

_PLACES = ("judge", "champion", "sample_batch")
"""Keys that stand in the identity as what they mean, or not at all."""


@dataclass(frozen=True, kw_only=True)
class ChampionModel:
    """The registered version to compare with, and how to get its folder."""

    about: Champion
    fetch: Callable[[], Path]


def evaluate(
    config: RunConfig,
    scored: Artifact,
    policy: Artifact,
    executor: Executor,
    *,
    champion: ChampionModel | None = None,
    output: Path | str | None = None,
) -> Artifact:
    """Makes ``report.json``, ``report.html``, ``margins.parquet``, and ``answers.parquet`` where prompts were answered.

    A refused model is still a complete output.

    Raises:
        StoreError: the policy was trained on other pairs than ``scored``.
        DataError: fewer held-out pairs than ``evaluate.min_heldout_pairs``.
        ConfigError: a rule or the judge cannot be used; or the pairs were scored by another model, or in another
            precision.
    """
    check_made_from(policy, "scored", scored)
    beta = float(policy.record.details["beta"])
    names = set_names(config)
    _check_safety_sets(config.evaluate, names, scored)
    content = {key: value for key, value in to_dict(config.evaluate).items() if key not in _PLACES}
    content |= {"seed": config.seed, "sets": names, "judge": None, "report": SCHEMA_VERSION}
    if config.evaluate.judge is not None:
        judging.check(config.evaluate.judge)
        content["judge"] = dict(judging.identity(config.evaluate.judge))
    inputs = {"scored": scored.record.digest, "policy": policy.record.digest, "model": model_digest(config)}
    check_same_model(config, inputs["model"], scored)
    check_same_dtype(config, scored)
    if champion is not None:
        inputs["champion"] = champion.about.digest
    reporter = Reporter.from_environment("evaluate")

    def body(out: Output) -> Summary:
        split = Split(scored, "heldout")
        heldout = _heldout(split, config.evaluate)
        models = _models(config, policy, champion, turn_ends(heldout), out)
        samples = answered(config, heldout, models, out, executor, reporter)
        preferences = _preferences(config, heldout, scored, samples, beta=beta)
        findings = Findings(
            beta=beta,
            heldout=preferences.heldout,
            sets=preferences.sets,
            divergence=samples.divergence,
            samples=samples.described,
            comparisons=samples.comparisons,
            champion=None if champion is None else champion.about,
            notes=samples.notes,
        )
        verdict = judge(findings, config.evaluate.gate)
        _write(out, heldout, preferences, samples, findings, verdict, read_history(policy.file(METRICS_FILE)), inputs)
        details = {
            "learned": verdict.learned,
            "passed": verdict.passed,
            "beta": beta,
            "champion": inputs.get("champion"),
        }
        counts = {"heldout_pairs": len(heldout), "heldout_groups": len(set(heldout["group"].to_pylist()))}
        return Summary(counts=counts, metrics=reporting.metrics(findings), details=details)

    artifact = make(config, "evaluate", content, inputs, body, output=output, resumable=True, scratch=(WORK, PARTS))
    if not artifact.reused:
        for scratch in (WORK, PARTS):
            discard(artifact.home, scratch, tell=reporter.message)
    return artifact


def _heldout(split: Split, section: EvaluateConfig) -> pa.Table:
    """The held-out pairs.

    Raises:
        DataError: too few of them, or of too few groups.
    """
    if split.num_pairs < section.min_heldout_pairs:
        raise DataError(
            "Too few held-out pairs to judge the policy",
            got=split.num_pairs,
            expected=f"at least {section.min_heldout_pairs} (evaluate.min_heldout_pairs)",
            fix="raise prepare.heldout_fraction, or bring more data",
        )
    heldout = split.table(_COLUMNS)
    if (num_groups := len(set(heldout["group"].to_pylist()))) < MIN_GROUPS:
        raise DataError(
            "The held-out pairs come from too few groups to judge the policy",
            got=f"{len(heldout)} pairs of {num_groups} groups",
            expected=f"at least {MIN_GROUPS} groups",
            fix="raise prepare.heldout_fraction, bring more data, or choose another prepare.group_key",
        )
    check_rows(heldout, section.row_tokens, "evaluate.row_tokens")
    return heldout


def _check_safety_sets(section: EvaluateConfig, names: list[str], scored: Artifact) -> None:
    """Raises:
    ConfigError: a rule names a set of which there are no held-out pairs.
    """
    if not section.gate.safety_sets:
        return
    indices = {index for table in Split(scored, "heldout").tables(["dataset"]) for index in _unique(table["dataset"])}
    there = sorted({names[index] for index in indices})
    if unknown := [name for name in section.gate.safety_sets if name not in there]:
        raise ConfigError(
            "evaluate.gate.safety_sets names a set without held-out pairs",
            got=", ".join(unknown),
            expected=f"any of {', '.join(there)}",
            fix="name a source with `name`, and put its pairs into the split heldout",
        )


def _unique(column: pa.ChunkedArray) -> list[int]:
    return pc.unique(column).to_pylist()  # type: ignore[no-any-return]


def _models(
    config: RunConfig, policy: Artifact, champion: ChampionModel | None, end_ids: tuple[int, ...], out: Output
) -> dict[str, Asked]:
    shared: dict[str, Any] = {
        "model": config.model,
        "frozen_base": config.train.lora is not None,
        "end_ids": end_ids,
    }
    models = {
        "policy": Asked(name="policy", weights=policy, **shared),
        "reference": Asked(name="reference", **shared),
    }
    if champion is not None:
        files = shared_copy(champion.fetch(), out)
        place = str(out.path / CHAMPION)
        theirs = replace(config.model, path=place, adapter=None, quantization=None)
        models["champion"] = Asked(name="champion", model=theirs, home=out.home, files=files)
    return models


def _preferences(
    config: RunConfig, heldout: pa.Table, scored: Artifact, samples: Samples, *, beta: float
) -> Preferences:
    names = set_names(config)
    trained_on = {index for table in Split(scored, "train").tables(["dataset"]) for index in _unique(table["dataset"])}
    table = join_scores(heldout, samples.policy_scores, prefix="policy_")
    champion = None
    if samples.champion_scores is not None:
        champion = _sums(join_scores(heldout, samples.champion_scores, prefix="champion_"), "champion")
    return measure(
        Heldout(
            groups=heldout["group"].to_pylist(),
            sets=[names[index] for index in heldout["dataset"].to_pylist()],
            origins=[origin or "" for origin in heldout["origin"].to_pylist()],
            strengths_P=np.array(heldout["strength"].to_pylist(), dtype=np.float64),
            chosen_lengths_P=lengths(heldout, "chosen").astype(np.float64),
            rejected_lengths_P=lengths(heldout, "rejected").astype(np.float64),
            policy=_sums(table, "policy"),
            reference=_sums(table, "reference"),
            champion=champion,
            trained_on=frozenset(names[index] for index in trained_on),
        ),
        beta=beta,
        seed=config.seed,
    )


def _sums(table: pa.Table, who: str) -> tuple[Floats, Floats]:
    return list_sums(table[f"{who}_chosen_logps"]), list_sums(table[f"{who}_rejected_logps"])


def _write(
    out: Output,
    heldout: pa.Table,
    preferences: Preferences,
    samples: Samples,
    findings: Findings,
    verdict: Verdict,
    history: list[dict[str, float]],
    inputs: Mapping[str, str],
) -> None:
    pq.write_table(
        pa.table({"pair_id": heldout["pair_id"], "margin": preferences.margins_P}), out.path / "margins.parquet"
    )
    if samples.answers is not None:
        pq.write_table(samples.answers, out.path / "answers.parquet", compression="zstd")
    differences_P = lengths(heldout, "chosen").astype(np.int64) - lengths(heldout, "rejected")
    reporting.write_report(
        reporting.Report(
            findings=findings,
            verdict=verdict,
            samples=samples.shown,
            margins_P=preferences.margins_P,
            length_differences_P=differences_P,
            history=history,
            identity=dict(inputs),
        ),
        out.path,
    )
