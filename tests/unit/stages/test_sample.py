"""Preference data of the model's own answers: sampled, rewarded, ranked, and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import EndpointJudge, FunctionJudge, RunConfig, SourceConfig
from dpo_train.data.pairs import Message
from dpo_train.data.prompts import read_prompt_lines
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, DataError, RunError
from dpo_train.stages import prepare, sample
from dpo_train.stages.executor import InProcess, TableFunction
from dpo_train.stages.sample import ANSWERS_FILE, RANKED_FILE
from tests.command import dpo, refused, write_config
from tests.tiny import tiny_config

LOCAL = InProcess()
PROMPTS = [
    (Message("user", f"question {number}: tell me about the {topic}"),)
    for number, topic in enumerate(("cat", "dog", "sea"))
]
JUDGE = FunctionJudge(kind="function", function="tests.unit.stages.test_sample:count_a")


def count_a(prompt: Sequence[Mapping[str, str]], answer: str) -> float:
    """A reward that a test can compute by itself; NaN where there is nothing to see."""
    assert prompt[-1]["role"] == "user"
    return float(answer.count("a")) if answer.strip() else float("nan")


def indifferent(prompt: Sequence[Mapping[str, str]], answer: str) -> float:
    return 1.0


def with_evaluate(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, evaluate=replace(config.evaluate, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return with_evaluate(tiny_config(tmp_path_factory.mktemp("sample")), judge=JUDGE, max_sample_tokens=12)


@pytest.fixture(scope="module")
def made(config: RunConfig) -> Artifact:
    return sample(config, PROMPTS, LOCAL, count=5)


def test_every_prompt_has_its_answers_and_their_rewards(made: Artifact) -> None:
    rows = pq.read_table(made.file(ANSWERS_FILE)).to_pylist()

    assert len(rows) == 15
    assert len({row["pair_id"] for row in rows}) == 3
    assert len({row["answer"] for row in rows}) > 10, "each is a sample of its own"
    for row in rows:
        assert row["reward"] == (float(row["answer"].count("a")) if row["answer"].strip() else None)


def test_ranked_answers_are_read_back_as_all_their_pairs(config: RunConfig, made: Artifact) -> None:
    """And the tokens of a prompt are those that were answered."""
    records = [json.loads(line) for line in made.file(RANKED_FILE).read_text(encoding="utf-8").splitlines()]
    source = SourceConfig(path=str(made.file(RANKED_FILE)), format="ranking", pairing="all", split="train")
    pairs = Split(
        prepare(replace(config, prepare=replace(config.prepare, path=None, sources=(source,))), LOCAL), "train"
    )

    assert {record["prompt"][0]["content"] for record in records} == {prompt[0].content for prompt in PROMPTS}
    expected = 0
    for record in records:
        scores = [answer["score"] for answer in record["answers"]]
        expected += sum(a != b for place, a in enumerate(scores) for b in scores[:place])
    table = pairs.table(("prompt", "chosen", "rejected")).to_pylist()
    assert len(table) == expected
    assert all(row["chosen"].count("a") > row["rejected"].count("a") for row in table)


def test_the_same_again_is_reused_and_other_content_is_not(config: RunConfig, made: Artifact) -> None:
    again = sample(config, [*PROMPTS, PROMPTS[0]], LOCAL, count=5)
    other_seed = sample(replace(config, seed=7), PROMPTS, LOCAL, count=5)
    cold = sample(config, PROMPTS, LOCAL, count=5, temperature=0.5)

    assert (again.reused, again.home) == (True, made.home)
    tables = [pq.read_table(each.file(ANSWERS_FILE))["answer"].to_pylist() for each in (made, other_seed, cold)]
    assert tables[0] != tables[1]
    assert tables[0] != tables[2]


class Interrupted(InProcess):
    """Counts the tables that a model is given, and dies instead of taking one more than it may."""

    def __init__(self, most: int) -> None:
        self.most, self.done = most, 0

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        function = make()
        for table in tables:
            if uses_model:
                if self.done == self.most:
                    raise KeyboardInterrupt
                self.done += 1
            yield function(table)


def test_what_was_answered_before_an_interruption_is_not_asked_again(config: RunConfig, tmp_path: Path) -> None:
    """15 answers, 4 at a time: two of four tables were answered."""
    config = replace(with_evaluate(config, sample_batch=4), store=str(tmp_path))
    first, second = Interrupted(2), Interrupted(99)
    with pytest.raises(KeyboardInterrupt):
        sample(config, PROMPTS, first, count=5)

    resumed = sample(config, PROMPTS, second, count=5)

    unbroken = sample(replace(config, store=f"{tmp_path}-unbroken"), PROMPTS, LOCAL, count=5)
    assert (first.done, second.done) == (2, 2)
    assert resumed.record.digest == unbroken.record.digest
    assert pq.read_table(resumed.file(ANSWERS_FILE)).equals(pq.read_table(unbroken.file(ANSWERS_FILE)))
    assert resumed.file(RANKED_FILE).read_bytes() == unbroken.file(RANKED_FILE).read_bytes()
    assert {path.name for path in resumed.path.iterdir()} == {path.name for path in unbroken.path.iterdir()}
    assert not list(resumed.path.rglob("*-parts"))


def test_without_a_judge_there_are_answers_and_no_ranking(config: RunConfig) -> None:
    made = sample(with_evaluate(config, judge=None), PROMPTS[:1], LOCAL, count=2)

    assert made.record.counts["answers"] == 2
    assert RANKED_FILE not in made.record.files


def test_a_judge_that_compares_is_refused(config: RunConfig) -> None:
    judge = EndpointJudge(kind="endpoint", url="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(ConfigError, match="each gets a reward of its own"):
        sample(with_evaluate(config, judge=judge), PROMPTS, LOCAL, count=2)


def test_prompts_that_are_too_long_are_counted_and_none_left_is_an_error(config: RunConfig) -> None:
    long = (Message("user", "cat " * 200),)
    made = sample(config, [PROMPTS[0], long], LOCAL, count=2)

    assert (made.record.counts["prompts"], made.record.counts["unread_prompts"]) == (1, 1)
    with pytest.raises(DataError, match="prompt_too_long"):
        sample(config, [long], LOCAL, count=2)


def test_answers_that_nothing_tells_apart_are_an_error(config: RunConfig) -> None:
    judge = FunctionJudge(kind="function", function="tests.unit.stages.test_sample:indifferent")
    with pytest.raises(RunError, match="no prompt differ in their reward"):
        sample(with_evaluate(config, judge=judge), PROMPTS, LOCAL, count=3)


def test_the_command_writes_a_file_to_train_on(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, target = tmp_path / "prompts.txt", tmp_path / "ranked.jsonl"
    prompts.write_text("tell me about the cat\n\ntell me about the sea\n", encoding="utf-8")
    written = write_config(config, tmp_path / "config.yaml")

    done = dpo("sample", written, prompts, target, "--answers", "4")

    assert done.code == 0, done.output
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [len(record["answers"]) for record in records] == [4, 4]
    assert f"prepare.path={target}" in done.output
    assert "exists already" in refused(capfd, "sample", written, prompts, target)


def test_a_text_may_hold_any_separator() -> None:
    lines = '{"prompt": "one\u2028two"}\r\n\n{"prompt": [{"role": "user", "content": "three\u0085"}]}\n'
    found = read_prompt_lines(lines, "p.jsonl")

    assert [prompt[0].content for prompt in found] == ["one\u2028two", "three\u0085"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '{"prompt": "x"}\n{"prompts": "y"}\n', "p.jsonl, line 2 has no prompt"),
        ("p.jsonl", "not json\n", "line 1 is no JSON"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "line 1 has no prompt"),
        ("p.txt", "\n \n", "There are no prompts"),
        ("p.json", '[{"prompt": "x"}]', "is no file of prompts"),
    ],
)
def test_a_file_without_prompts_is_refused(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str, expected: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    written = write_config(config, tmp_path / "config.yaml")
    assert expected in refused(capfd, "sample", written, tmp_path / name, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_judge_the_command_says_so(
    config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("tell me\n", encoding="utf-8")
    written = write_config(with_evaluate(config, judge=None), tmp_path / "config.yaml")

    assert "evaluate.judge" in refused(capfd, "sample", written, tmp_path / "p.txt", tmp_path / "out.jsonl")
