"""prompts -> several answers of the model to each; with a judge that rewards, preference data of its own making

prompts --tokenizer--> ids --model--> answers --judge--> rewards ; answers.parquet, ranked.jsonl

The DPO paper makes its sentiment data like this (arXiv 2305.18290, section 6.1): answers of the SFT model, preferences
by a reward. ``ranked.jsonl`` is read back as the format `ranking`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train.artifacts import Artifact, Output, Summary, discard
from dpo_train.config import EndpointJudge, FunctionJudge, RewardModelJudge, RunConfig, to_dict
from dpo_train.data.folder import model_folder
from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.errors import ConfigError, DataError, RunError
from dpo_train.evaluate import judge as judging
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.evaluate_judge import reward_answers
from dpo_train.stages.evaluate_models import WORK, Asked, ask, prompt_tables
from dpo_train.stages.executor import Executor
from dpo_train.stages.prepare_inputs import chat_template, token_options
from dpo_train.stages.with_model import PARTS

RANKED_FILE = "ranked.jsonl"
ANSWERS_FILE = "answers.parquet"

Prompt = tuple[Message, ...]

_TOKENS = ("template", "template_options", "max_prompt_tokens", "prompt_truncation")
"""Of the section ``prepare``: what decides how a prompt is read."""


def sample(
    config: RunConfig,
    prompts: Sequence[Prompt],
    executor: Executor,
    *,
    count: int,
    temperature: float = 1.0,
    output: Path | str | None = None,
) -> Artifact:
    """Makes ``answers.parquet`` (a row per answer: pair_id of its prompt, index, answer, truncated, reward), and
    ``ranked.jsonl`` (a record per prompt, its answers with their scores) if ``evaluate.judge`` rewards.

    Args:
        prompts: conversations, the last turn of which is answered; of equal ones the first counts.
        count: answers to each prompt.

    Raises:
        ConfigError: the judge compares instead of rewarding, or is not to be had.
        DataError: no prompt can be read by the model.
        RunError: the judge ranks nothing.
    """
    judge = config.evaluate.judge
    if isinstance(judge, EndpointJudge):
        raise ConfigError(
            "evaluate.judge compares two answers, and here each gets a reward of its own",
            got="kind: endpoint",
            expected="kind: function or reward_model, or no judge",
        )
    if judge is not None:
        judging.check(judge)
    section = to_dict(config.prepare)
    content = {
        "count": count,
        "temperature": temperature,
        "seed": config.seed,
        "max_sample_tokens": config.evaluate.max_sample_tokens,
        "judge": None if judge is None else dict(judging.identity(judge)),
        "tokens": {name: section[name] for name in _TOKENS} | {"chat_template": chat_template(config)},
    }
    prompts = list(dict.fromkeys(prompts))
    inputs = {"prompts": _digest(prompts), "model": model_digest(config)}
    reporter = Reporter.from_environment("sample")

    def body(out: Output) -> Summary:
        ranked = 0
        asked, end_ids = _read(config, prompts)
        model = Asked(name="reference", model=config.model, end_ids=end_ids)
        tables = prompt_tables(
            asked["pair_id"], asked["prompt_ids"], (temperature,), size=config.evaluate.sample_batch, count=count
        )
        answers = ask(config, model, out, executor, reporter, prompts=tables).answers
        assert answers is not None, "there are prompts"
        answers = answers.sort_by([("pair_id", "ascending"), ("index", "ascending")])
        if judge is not None:
            answers = _rewarded(config, judge, asked, answers, executor, reporter)
            ranked = _write_ranked(prompts, asked, answers, out.path / RANKED_FILE)
        pq.write_table(answers, out.path / ANSWERS_FILE, compression="zstd")
        counts = {"prompts": len(asked), "unread_prompts": len(prompts) - len(asked), "answers": len(answers)}
        told = f"{len(answers)} answers to {len(asked)} of {len(prompts)} prompts"
        if judge is not None:
            counts |= {"ranked_prompts": ranked, "unrewarded_answers": answers["reward"].null_count}
            told += f", of which {ranked} have answers of different reward"
        return Summary(counts=counts, details={"summary": told})

    artifact = make(config, "sample", content, inputs, body, output=output, resumable=True, scratch=(WORK, PARTS))
    if not artifact.reused:
        for scratch in (WORK, PARTS):
            discard(artifact.home, scratch, tell=reporter.message)
    return artifact


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([(turn.role, turn.content, turn.extra) for turn in prompt]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _read(config: RunConfig, prompts: Sequence[Prompt]) -> tuple[pa.Table, tuple[int, ...]]:
    """The prompts that the model can read (pair_id, prompt, prompt_ids), and the tokens that end an answer to them.

    A prompt is read as that of a pair is: by the tokens that a training on its answers will see.
    """
    from dpo_train.data.tokens import PairTokenizer, load_tokenizer

    folder = model_folder(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    reader = PairTokenizer(tokenizer, token_options(config.prepare, chat_template(config)))
    answers = Message("assistant", "yes"), Message("assistant", "no")
    pairs = [
        PreferencePair(prompt=prompt, chosen=answers[0], rejected=answers[1], group=_digest([prompt]))
        for prompt in prompts
    ]
    encoded = reader.encode_many(pairs)
    found = [(pair, each) for pair, each in zip(pairs, encoded, strict=True) if not isinstance(each, Rejection)]
    if not found:
        first = next((each for each in encoded if isinstance(each, Rejection)), None)
        raise DataError(
            "The model can read none of the prompts" if prompts else "There are no prompts",
            got="nothing" if first is None else f"{first.reason}: {first.detail}",
            expected="prompts within prepare.max_prompt_tokens that the chat template can write",
        )
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    turns = [[{"role": turn.role, "content": turn.content} for turn in pair.prompt] for pair, _ in found]
    table = pa.table(
        {
            "pair_id": [pair.group for pair, _ in found],
            "prompt": pa.array(turns, message),
            "prompt_ids": pa.array([each.tokens.prompt_ids.tolist() for _, each in found], pa.list_(pa.int32())),
        }
    )
    return table, tuple(sorted({int(each.tokens.chosen_ids[-1]) for _, each in found if not each.truncated_chosen}))


def _rewarded(
    config: RunConfig,
    judge: FunctionJudge | RewardModelJudge,
    asked: pa.Table,
    answers: pa.Table,
    executor: Executor,
    reporter: Reporter,
) -> pa.Table:
    rows = {row["pair_id"]: row for row in asked.select(["pair_id", "prompt"]).to_pylist()}
    said = list(zip(answers["pair_id"].to_pylist(), answers["answer"].to_pylist(), strict=True))
    rewards = reward_answers(config, judge, rows, sorted(set(said)), executor, reporter)
    return answers.append_column("reward", pa.array([rewards[each] for each in said], pa.float64()))


def _write_ranked(prompts: Sequence[Prompt], asked: pa.Table, answers: pa.Table, target: Path) -> int:
    """A line per prompt whose answers differ in their reward; returns how many there are. An answer without a reward,
    or the second of two equal ones, says nothing about a preference.

    Raises:
        RunError: there is no such prompt.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in answers.to_pylist():
        if row["reward"] is not None:
            scores.setdefault(row["pair_id"], {})[row["answer"]] = row["reward"]
    turns = {_digest([prompt]): [_turn(turn) for turn in prompt] for prompt in prompts}
    records = [
        {"prompt": turns[pair_id], "answers": [{"answer": text, "score": score} for text, score in found.items()]}
        for pair_id in asked["pair_id"].to_pylist()
        if len(set((found := scores.get(pair_id, {})).values())) > 1
    ]
    if not records:
        raise RunError(
            "The answers to no prompt differ in their reward",
            got=f"{len(answers)} answers, {answers['reward'].null_count} without a reward",
            fix="ask for more answers or warmer ones (--answers, --temperature), or mend evaluate.judge",
        )
    with target.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(records)


def _turn(turn: Message) -> dict[str, Any]:
    return {"role": turn.role, "content": turn.content, **(json.loads(turn.extra) if turn.extra else {})}
