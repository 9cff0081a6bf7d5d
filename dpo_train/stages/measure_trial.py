"""The policy of one trial of a sweep -> what validation pairs and prompts say of it

pairs    --policy-->             log-probs --> accuracy, margin
prompts  --policy, reference-->  answers   --> KL, length ratio --judge--> reward, win rate

On the way of a trial its answers are measured as at its end.
Nothing of the held-out split is looked at: the evaluation must find it untouched by the choice.
P: validation pairs, N: prompts, G: groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output
from dpo_train.config import EndpointJudge, JudgeConfig, RunConfig
from dpo_train.data.shards import Split, list_sums
from dpo_train.disk import locked
from dpo_train.errors import ConfigError
from dpo_train.evaluate.judge import Judgement, compare_rewards, win_rate
from dpo_train.evaluate.samples import describe, turn_ends
from dpo_train.evaluate.statistics import Floats, Ints, Means, effective_groups, number_groups, wilson
from dpo_train.evaluate.trials import NUMBERS, Parameter, Point, Trial
from dpo_train.findings import Estimate
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_rows
from dpo_train.stages.evaluate_judge import ask_endpoint, reward_answers
from dpo_train.stages.evaluate_models import SCORE_COLUMNS, WORK, Asked, Replies, ask, pair_tables, prompt_tables
from dpo_train.stages.evaluate_samples import (
    answer_log_ratios,
    answer_tables,
    check_lengths,
    distinct_prompts,
    estimate_kl,
)
from dpo_train.stages.executor import Executor
from dpo_train.stages.score_reference import join_scores

TEMPERATURE = 1.0
"""Of all answers: the KL is of answers at 1, and a reward belongs to the KL of the very answers that earn it."""

_COLUMNS = (
    *(*SCORE_COLUMNS, "group", "prompt", "chosen", "truncated_chosen"),
    *("reference_chosen_logps", "reference_rejected_logps"),
)
_REFERENCE_REWARDS = "reference-rewards.json"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the judge says of a policy's answers."""

    reward: Estimate | None = None
    win_rate: Estimate | None = None
    values_N: Mapping[str, Floats] = field(default_factory=dict)
    """By metric each prompt's value (NaN: unjudged)."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """By metric why it cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a policy's answers to the validation prompts show."""

    kl: Estimate | None = None
    length_ratio: Estimate | None = None
    judged: Judged = field(default_factory=Judged)
    values_N: Mapping[str, Floats] = field(default_factory=dict)
    """By metric each prompt's value (NaN: unjudged)."""

    @property
    def deviations(self) -> dict[str, tuple[float, ...]]:
        """See ``Point.deviations``."""
        return {name: deviations(values_N, np.arange(len(values_N))) for name, values_N in self.values_N.items()}

    @property
    def numbers(self) -> dict[str, Any]:
        """Estimates, or None, by the names that a trial has for them."""
        found = {"kl": self.kl, "length_ratio": self.length_ratio}
        return {**found, "reward": self.judged.reward, "win_rate": self.judged.win_rate}


def asks_judge(config: RunConfig, *, at_end: bool) -> bool:
    """Whether the judge is asked of a trial, at its end or where it pauses. On the way an endpoint, which costs money,
    is asked only where ``sweep.kl_points`` wants to know, and not of every trial that halving may stop."""
    sweep, is_paid = config.sweep, isinstance(config.evaluate.judge, EndpointJudge)
    return sweep.select.metric != "accuracy" and (at_end or sweep.kl_points > 1 or not is_paid)


def check_measurable(config: RunConfig, scored: Artifact) -> None:
    """Whether what the sweep wants to know of its trials can be found out, before any of them is trained.

    Raises:
        ConfigError: a pair, or a prompt with its longest answer, might not fit into a row; or there are too few prompts
            to tell the KL by.
    """
    validation, prompts = _asked_of(config, scored)
    check_rows(validation, config.evaluate.row_tokens, "evaluate.row_tokens")
    check_lengths(prompts, config)
    if config.sweep.select.max_kl is not None and len(prompts) < 2:
        raise ConfigError(
            "sweep.select.max_kl needs a KL, and one prompt says nothing about the spread between prompts",
            got=f"{len(prompts)} prompt, sweep.num_prompts={config.sweep.num_prompts}",
            expected="two validation prompts of different groups, better 16 or more",
            fix="raise sweep.num_prompts and prepare.validation_fraction, or leave max_kl out",
        )


def _asked_of(config: RunConfig, scored: Artifact) -> tuple[pa.Table, pa.Table]:
    """The validation pairs, and those of them whose prompts are answered."""
    validation = Split(scored, "validation").table(_COLUMNS)
    return validation, distinct_prompts(validation, config.sweep.num_prompts)


def measure_trial(
    config: RunConfig,
    scored: Artifact,
    policy: Artifact,
    *,
    name: str,
    parameters: Mapping[str, Parameter],
    seed: int,
    executor: Executor,
    out: Output,
    reporter: Reporter,
) -> Trial:
    """Measures a trial; one whose numbers cannot be used comes back with its ``failure``.

    What the reference says to the prompts is asked once, and kept in the scratch folder ``WORK`` of ``out`` for all
    trials that are measured with it, also side by side; so is what a trial said before its measuring was cut short.

    Args:
        config: of the sweep, the same for all trials: its seed is that of answers and intervals, so that equal policies
            give equal answers.
        policy: output of the trial's training.
        name, parameters, seed: of the trial.

    Raises:
        ConfigError: the judge cannot be used.
        RunError: the judge failed.
    """
    validation, prompts = _asked_of(config, scored)
    asked, mine = _policy(config, policy, validation), _folder_of(policy, out)
    said = ask(
        config, asked, mine, executor, reporter, pairs=pair_tables(validation.select(SCORE_COLUMNS)),
        prompts=_questions(config, prompts),
    )  # fmt: skip
    chosen_P, rejected_P = _log_ratios(validation, said)
    trial = Trial(name=name, parameters=parameters, seed=seed, steps=policy.record.counts["steps"])
    if wrong := np.count_nonzero(~np.isfinite(chosen_P - rejected_P)):
        return replace(trial, failure=f"log-probs of {wrong} of {len(chosen_P)} validation pairs are not finite")
    group_P = number_groups(validation["group"].to_pylist())
    margins_P = float(policy.record.details["beta"]) * (chosen_P - rejected_P)
    right_P = (margins_P > 0) + 0.5 * (margins_P == 0)
    means = Means({"right": right_P, "margin": margins_P}, group_P, seed=config.seed)
    trial = replace(
        trial,
        accuracy=means.share("right"),
        margin=means.mean("margin"),
        deviations={"accuracy": deviations(right_P, group_P)},
    )
    if said.answers is not None:
        sampled = _sampled(config, asked, said.answers, prompts, executor, out, mine, reporter, at_end=True)
        trial = replace(
            trial,
            **sampled.numbers,
            deviations={**trial.deviations, **sampled.deviations},
            failure=_problem(config, sampled),
        )
    return replace(trial, points=_points(policy, trial, np.bincount(group_P)))


def sample_paused(
    config: RunConfig, scored: Artifact, policy: Artifact, *, executor: Executor, out: Output, reporter: Reporter
) -> Sampled:
    """What a policy's answers show on the way of a trial. That the judge has nothing to say there is no failure of the
    trial. Arguments and errors are those of ``measure_trial``."""
    validation, prompts = _asked_of(config, scored)
    asked, mine = _policy(config, policy, validation), _folder_of(policy, out)
    answers = ask(config, asked, mine, executor, reporter, prompts=_questions(config, prompts)).answers
    if answers is None:
        return Sampled()
    sampled = _sampled(config, asked, answers, prompts, executor, out, mine, reporter, at_end=False)
    if (problem := _problem(config, sampled)) is not None:
        reporter.message(f"note: after {policy.record.counts['steps']} steps {problem}")
    return sampled


def accuracy_of(share: float, sizes_G: Ints) -> Estimate:
    """The accuracy that a training has measured, as an estimate. ``sizes_G``: pairs of each validation group."""
    num_pairs = int(sizes_G.sum())
    return wilson(share * num_pairs, effective_groups(sizes_G.astype(np.float64)), n=num_pairs)


def _policy(config: RunConfig, policy: Artifact, validation: pa.Table) -> Asked:
    return Asked(
        name="policy",
        model=config.model,
        frozen_base=config.train.lora is not None,
        end_ids=turn_ends(validation),
        weights=policy,
    )


def _folder_of(policy: Artifact, out: Output) -> Output:
    """Of what one policy says, and the reference of its answers: trials that run side by side share nothing else."""
    mine = Output(storage.join(out.home, WORK, policy.record.digest))
    mine.path.mkdir(parents=True, exist_ok=True)
    return mine


def deviations(values_P: Floats, group_P: Ints) -> tuple[float, ...]:
    """[G] what each group adds to the error of the mean (``Trial.deviations``), to six digits; NaN: no value."""
    is_there_P = ~np.isnan(values_P)
    sums_G = np.bincount(group_P, weights=np.where(is_there_P, values_P, 0.0))
    sizes_G = np.bincount(group_P, weights=is_there_P)
    total = max(1.0, sizes_G.sum())
    found_G = (sums_G - sums_G.sum() / total * sizes_G) / total
    return tuple(float(f"{value:.6g}") for value in found_G.tolist())


def _questions(config: RunConfig, prompts: pa.Table) -> list[pa.Table]:
    size = config.evaluate.sample_batch
    return prompt_tables(prompts["pair_id"], prompts["prompt_ids"], (TEMPERATURE,), size=size) if len(prompts) else []


def _log_ratios(validation: pa.Table, said: Replies) -> tuple[Floats, Floats]:
    """log policy - log reference [P] of the chosen and of the rejected answers."""
    table = join_scores(validation, said.scores, prefix="policy_")
    chosen_P, rejected_P = (
        list_sums(table[f"policy_{side}_logps"]) - list_sums(table[f"reference_{side}_logps"])
        for side in ("chosen", "rejected")
    )
    return chosen_P, rejected_P


def _sampled(
    config: RunConfig,
    asked: Asked,
    answers: pa.Table,
    prompts: pa.Table,
    executor: Executor,
    out: Output,
    mine: Output,
    reporter: Reporter,
    *,
    at_end: bool,
) -> Sampled:
    """What the policy's answers show. ``out`` holds what is of all trials, ``mine`` what is of this policy."""
    reference = replace(asked, name="reference", weights=None)
    with locked(out.path / WORK / "reference"):  # trials may be measured side by side
        theirs = ask(config, reference, out, executor, reporter, prompts=_questions(config, prompts)).answers
    scores = ask(config, reference, mine, executor, reporter, pairs=answer_tables(answers, prompts)).scores
    divergence = estimate_kl(answers, scores)
    ratios = answer_log_ratios(answers, scores)
    ratios_N = np.array([ratios[pair_id] for pair_id in prompts["pair_id"].to_pylist()])
    (described,) = describe(answers, theirs, model="policy", seed=config.seed)
    sampled = Sampled(
        kl=None if divergence is None else divergence.kl,
        length_ratio=described.length_ratio,
        values_N={} if divergence is None else {"kl": ratios_N},
    )
    judge = config.evaluate.judge
    if judge is None or not asks_judge(config, at_end=at_end):
        return sampled
    judged = _judged(config, judge, prompts, _texts(answers), _texts(theirs), executor, out, reporter)
    return replace(sampled, judged=judged, values_N={**sampled.values_N, **judged.values_N})


def _problem(config: RunConfig, sampled: Sampled) -> str | None:
    """Why what selects cannot be used, in words."""
    metric = config.sweep.select.metric
    problem = sampled.judged.problems.get(metric)
    return None if problem is None else f"its {metric} cannot be used: {problem}"


def _judged(
    config: RunConfig,
    judge: JudgeConfig,
    prompts: pa.Table,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    executor: Executor,
    out: Output,
    reporter: Reporter,
) -> Judged:
    rows = {row["pair_id"]: row for row in prompts.select(["pair_id", "prompt"]).to_pylist()}
    if isinstance(judge, EndpointJudge):
        judgements = list(ask_endpoint(judge, rows, ours, {"reference": theirs}, reporter)["reference"].values())
        return _won(judgements, list(rows), judge.model)

    def rewards(texts: Mapping[str, str]) -> list[float | None]:
        found = reward_answers(config, judge, rows, [(each, texts[each]) for each in rows], executor, reporter)
        return [found[each, texts[each]] for each in rows]

    kept = out.path / WORK / _REFERENCE_REWARDS
    with locked(kept):
        if not kept.is_file():
            out.write_json(f"{WORK}/{_REFERENCE_REWARDS}", rewards(theirs))
    mine = rewards(ours)
    won = _won(compare_rewards(mine, json.loads(kept.read_text(encoding="utf-8"))), list(rows), judge.kind)
    mine_N = np.array(mine, dtype=np.float64)
    if not np.isfinite(mine_N).any():
        return replace(won, problems={**won.problems, "reward": "the judge rewards none of the answers with a number"})
    mine_N[~np.isfinite(mine_N)] = np.nan
    reward = Means({"": mine_N}, np.arange(len(mine_N)), seed=config.seed).mean("")
    return replace(won, reward=reward, values_N={**won.values_N, "reward": mine_N})


def _won(judgements: Sequence[Judgement], prompt_ids: Sequence[str], judge: str) -> Judged:
    found = win_rate(judgements, prompt_ids, opponent="reference", judge=judge, temperature=TEMPERATURE)
    outcomes = [judgement.outcome for judgement in judgements]
    return Judged(
        win_rate=None if found.problem else found.win_rate,
        values_N={"win_rate": np.array(outcomes, dtype=np.float64)},
        problems={"win_rate": found.problem} if found.problem else {},
    )


def _texts(answers: pa.Table) -> dict[str, str]:
    return dict(zip(answers["pair_id"].to_pylist(), answers["answer"].to_pylist(), strict=True))


def _points(policy: Artifact, trial: Trial, sizes_G: Ints) -> tuple[Point, ...]:
    """What the training itself measured on the way, and the end as it was measured here."""
    end = int(policy.record.details["kept_step"])
    way: list[Point] = []
    for line in read_history(policy.file(METRICS_FILE)):
        accuracy = line.get("validation/rewards/accuracy")
        if accuracy is not None and line["step"] + 1 < end:
            way.append(Point(step=int(line["step"]) + 1, accuracy=accuracy_of(accuracy, sizes_G)))
    of_prompts = {name: found for name, found in trial.deviations.items() if name != "accuracy"}
    return (*way, Point(step=end, **{name: getattr(trial, name) for name in NUMBERS}, deviations=of_prompts))
