"""policy and held-out pairs -> report with a verdict"""

from __future__ import annotations

import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import ModelConfig, RunConfig, to_dict
from dpo_train.data.shards import Split, list_sums
from dpo_train.errors import DataError
from dpo_train.evaluate.gate import judge
from dpo_train.evaluate.preference import Floats, measure
from dpo_train.evaluate.report import Report, Sample, estimates, write_report
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_rows
from dpo_train.stages.common import check_made_from, make, model_digest, storage_options
from dpo_train.stages.executor import Executor, TableFunction
from dpo_train.stages.score_reference import join_scores, score_table, score_table_of

MIN_GROUPS = 10
"""Groups are what the intervals resample; over fewer a bootstrap sees too little spread."""

_COLUMNS = (
    *("pair_id", "group", "prompt_ids", "chosen_ids", "rejected_ids"),
    *("reference_chosen_logps", "reference_rejected_logps"),
)
"""What is measured: of a ranking the best answer against the second."""


def evaluate(
    config: RunConfig, scored: Artifact, policy: Artifact, executor: Executor, *, output: Path | str | None = None
) -> Artifact:
    """Makes ``report.json``, ``report.html`` and ``margins.parquet``. A refused model is still a complete output.

    Raises:
        StoreError: the policy was trained on other pairs than ``scored``.
        DataError: fewer held-out pairs than ``evaluate.min_heldout_pairs``.
    """
    section = config.evaluate
    check_made_from(policy, "scored", scored)
    beta = float(policy.record.details["beta"])
    content = {**to_dict(section), "seed": config.seed}
    inputs = {"scored": scored.record.digest, "policy": policy.record.digest, "model": model_digest(config)}
    reporter = Reporter.from_environment("evaluate")

    def body(out: Output) -> Summary:
        split = Split(scored, "heldout")
        if split.num_pairs < section.min_heldout_pairs:
            raise DataError(
                "Too few held-out pairs to judge the policy",
                got=split.num_pairs,
                expected=f"at least {section.min_heldout_pairs} (evaluate.min_heldout_pairs)",
                fix="raise prepare.heldout_fraction, or bring more data",
            )
        heldout = split.table(_COLUMNS)
        num_groups = len(set(heldout["group"].to_pylist()))
        if num_groups < MIN_GROUPS:
            raise DataError(
                "The held-out pairs come from too few groups to judge the policy",
                got=f"{len(heldout)} pairs of {num_groups} groups",
                expected=f"at least {MIN_GROUPS} groups",
                fix="raise prepare.heldout_fraction, bring more data, or choose another prepare.group_key",
            )
        check_rows(heldout, section.row_tokens, "evaluate.row_tokens")
        scorer = functools.partial(score_table_of, config, policy, section.row_tokens)
        table = join_scores(heldout, score_table(heldout, scorer, executor, reporter), prefix="policy_")
        preferences = measure(
            _sums(table, "policy"), _sums(table, "reference"), heldout["group"].to_pylist(), beta=beta, seed=config.seed
        )
        margins = pa.table({"pair_id": heldout["pair_id"], "margin": preferences.margins_P})
        pq.write_table(margins, out.path / "margins.parquet")
        verdict = judge(preferences.accuracy, preferences.margin, section.gate)
        samples = _sample(config, _first(split, section.num_samples), policy, executor, reporter)
        history = read_history(policy.file(METRICS_FILE))
        report = Report(
            beta=beta, preferences=preferences, verdict=verdict, samples=samples, history=history, identity=inputs
        )
        write_report(report, out.path)
        numbers = estimates(preferences)
        metrics = {name: estimate.value for name, estimate in numbers.items()}
        metrics |= {f"{name}_low": estimate.low for name, estimate in numbers.items()}
        metrics |= {f"{name}_high": estimate.high for name, estimate in numbers.items()}
        details = {"learned": verdict.learned, "passed": verdict.passed, "beta": beta}
        return Summary(
            counts={"heldout_pairs": len(heldout), "heldout_groups": num_groups}, metrics=metrics, details=details
        )

    return make(config, "evaluate", content, inputs, body, output=output)


def _answers_of(
    options: storage.Options, model: ModelConfig, device: str, policy: Artifact, max_tokens: int, seed: int
) -> TableFunction:
    """Builds the sampler in its worker; torch is imported there and not here."""
    from dpo_train.evaluate.generate import AnswerPrompts

    storage.use(options)
    return AnswerPrompts(model, device, str(policy.path), max_tokens, seed)


def _sample(
    config: RunConfig, heldout: pa.Table, policy: Artifact, executor: Executor, reporter: Reporter
) -> list[Sample]:
    if not len(heldout):
        return []
    section = config.evaluate
    tasks = [
        heldout.slice(index, 1).select(["pair_id", "prompt_ids"]).append_column("model", pa.array([model]))
        for index in range(len(heldout))
        for model in ("reference", "policy")
    ]
    make_answers = functools.partial(
        _answers_of,
        storage_options(config),
        config.model,
        config.compute.device,
        policy,
        section.max_sample_tokens,
        config.seed,
    )
    found: dict[tuple[str, str], str] = {}
    for table in executor.map_tables(make_answers, tasks, uses_model=True):
        found |= {(row["pair_id"], row["model"]): row["answer"] for row in table.to_pylist()}
        reporter.progress(len(found), len(tasks), "answers")
    return [
        Sample(
            prompt="\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"]),
            reference=found[row["pair_id"], "reference"],
            policy=found[row["pair_id"], "policy"],
        )
        for row in heldout.to_pylist()
    ]


def _first(split: Split, count: int) -> pa.Table:
    """The split's first pairs with their prompts: no more shards are read than hold them."""
    found: list[pa.Table] = []
    for table in split.tables(["pair_id", "prompt", "prompt_ids"]):
        found.append(table.slice(0, count - sum(map(len, found))))
        if sum(map(len, found)) == count:
            break
    return pa.concat_tables(found)


def _sums(table: pa.Table, who: str) -> tuple[Floats, Floats]:
    return list_sums(table[f"{who}_chosen_logps"]), list_sums(table[f"{who}_rejected_logps"])
