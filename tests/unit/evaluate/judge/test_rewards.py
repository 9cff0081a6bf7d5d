"""Judges that reward: a Python function, and what becomes of rewards."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_train.config import FunctionJudge, RewardModelJudge
from dpo_train.errors import RunError
from dpo_train.evaluate.judge import best_of, compare_rewards, rewarder
from tests.unit.model.reward_models import tiny_reward_model

MESSAGE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _rows(*answers: str) -> pa.Table:
    prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(len(answers))]
    ids = [f"id{number}" for number in range(len(answers))]
    return pa.table({"id": ids, "prompt": pa.array(prompts, MESSAGE), "answer": list(answers)})


def _judge(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, module: str) -> FunctionJudge:
    (folder / f"{module}.py").write_text(f"import math\n\ndef reward(prompt, answer):\n    {body}\n")
    monkeypatch.chdir(folder)
    return FunctionJudge(kind="function", function=f"{module}:reward")


def test_function_of_the_current_folder_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the messages and the answer; NaN becomes null; whole numbers are numbers."""
    body = "return math.nan if answer == '?' else len(answer) + (prompt == [{'role': 'user', 'content': 'question 2'}])"
    judge = _judge(tmp_path, body, monkeypatch, "rewards_by_length")

    found = rewarder(judge, "cpu")(_rows("abc", "?", "abc"))

    assert found.to_pylist() == [
        {"id": "id0", "reward": 3.0},
        {"id": "id1", "reward": None},
        {"id": "id2", "reward": 4.0},
    ]
    assert found.schema.field("reward").type == pa.float64()


def test_function_that_was_edited_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the module was imported long ago; the judge's identity is its file as it is now."""
    judge = _judge(tmp_path, "return 1", monkeypatch, "edited_rewards")
    assert rewarder(judge, "cpu")(_rows("a"))["reward"].to_pylist() == [1.0]

    _judge(tmp_path, "return 22.5", monkeypatch, "edited_rewards")

    assert rewarder(judge, "cpu")(_rows("a"))["reward"].to_pylist() == [22.5]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('x')", r"raised KeyError at the prompt 'question 0': 'x'"),
        ("return None", r"returned no number at the prompt 'question 0'. Got: None"),
        ("return '1.5'", r"returned no number .* Got: '1.5'"),
        ("return True", r"returned no number .* Got: True"),
        ("return [1.0]", r"returned no number .* Got: \[1.0\]"),
        ("return 10**5000", r"returned a number at the prompt 'question 0' that is too large for a float"),
    ],
)
def test_function_that_fails_is_named_with_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    """A mistake of the function must not look like a judgement."""
    judge = _judge(tmp_path, body, monkeypatch, f"rewards_{abs(hash(body))}")
    with pytest.raises(RunError, match=f"function {judge.function} {words}"):
        rewarder(judge, "cpu")(_rows("a"))


def test_reward_model_rewards_rows(tmp_path: Path) -> None:
    """Through the same interface; equal conversations get equal rewards, others do not."""
    judge = RewardModelJudge(kind="reward_model", path=str(tiny_reward_model(tmp_path)))
    found = rewarder(judge, "cpu")(_rows("kind", "rude").slice(0, 2))
    rewards = found["reward"].to_pylist()
    assert found["id"].to_pylist() == ["id0", "id1"]
    assert all(math.isfinite(reward) for reward in rewards)
    assert rewards[0] != rewards[1]


def test_larger_reward_wins() -> None:
    """Equal ones tie; without one of both, or with NaN, there is no outcome."""
    ours, theirs = [2.0, 1.0, 1.0, None, 1.0, math.nan, math.inf], [1.0, 2.0, 1.0, 1.0, None, 1.0, 1.0]
    outcomes = [judgement.outcome for judgement in compare_rewards(ours, theirs)]
    assert outcomes == [1.0, 0.0, 0.5, None, None, None, 1.0]
    assert all(judgement.orders is None for judgement in compare_rewards(ours, theirs))


def test_best_is_the_first_of_the_largest() -> None:
    """Answers without a reward are never the best where another has one."""
    assert best_of([1.0, 3.0, 3.0]) == 1
    assert best_of([None, math.nan, -5.0]) == 2
    assert best_of([None, None]) == 0
