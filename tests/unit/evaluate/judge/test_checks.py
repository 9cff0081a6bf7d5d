"""What is found out about a judge before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_train.config import EndpointJudge, FunctionJudge, RewardModelJudge, parse_config
from dpo_train.errors import ConfigError, ModelError
from dpo_train.evaluate.judge import check, identity
from tests.unit.model.reward_models import tiny_reward_model


def _endpoint(**changes: Any) -> EndpointJudge:
    return EndpointJudge(**{"kind": "endpoint", "url": "https://host/v1", "model": "m", **changes})


def _function(name: str) -> FunctionJudge:
    return FunctionJudge(kind="function", function=name)


@pytest.mark.parametrize(
    "url", ["https://host/v1", "http://localhost:8000/v1/", "http://[::1]:8000", "http://10.0.0.1/openai/v1"]
)
def test_whole_address_is_taken(url: str) -> None:
    """With a key in the environment and a default prompt there is nothing to say."""
    check(_endpoint(url=url))


@pytest.mark.parametrize(
    "url",
    ["host/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://ho st", "http://[::1", "https://h/v1#x"],
)
def test_address_that_is_none_is_refused(url: str) -> None:
    """The message shows what was given and what is meant."""
    with pytest.raises(ConfigError, match=r"not the address of a server.*https://host/v1"):
        check(_endpoint(url=url))


@pytest.mark.parametrize("url", ["https://me:hunter2@host/v1", "https://host/v1?api-key=hunter2"])
def test_secret_in_the_address_is_refused_and_not_shown(url: str) -> None:
    """The address is recorded with the run."""
    with pytest.raises(ConfigError) as caught:
        check(_endpoint(url=url))
    assert "hunter2" not in str(caught.value)


def test_key_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is not set is a mistake; one that holds what no header can is named, not shown."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"environment variable JUDGE_KEY is not set.*export JUDGE_KEY"):
        check(_endpoint(api_key_variable="JUDGE_KEY"))
    check(_endpoint(api_key_variable=""))
    for bad in ("sk-1\nX-Other: 2", "schlüssel"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ConfigError, match="JUDGE_KEY holds characters") as caught:
            check(_endpoint(api_key_variable="JUDGE_KEY"))
        assert bad not in str(caught.value)


def test_limit_of_cost_needs_a_price() -> None:
    """Else nothing would ever count towards it."""
    with pytest.raises(ConfigError, match="max_cost has no meaning without prices"):
        check(_endpoint(max_cost=1.0))
    check(_endpoint(max_cost=1.0, price_per_million_output=2.0))


def test_prompt_is_read() -> None:
    """A file that is not there is found at once."""
    with pytest.raises(ConfigError, match=r"prompt /absent\.txt cannot be read.*dialogue, summary, or a text file"):
        check(_endpoint(prompt="/absent.txt"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_here:reward", "cannot be imported: ModuleNotFoundError"),
        ("check_broken:reward", "cannot be imported: ZeroDivisionError"),
        ("check_whole:absent", "holds no function absent"),
        ("check_whole:number", "holds no function number.*int"),
        ("check_whole.reward", "cannot be read"),
        ("check whole:reward", "cannot be read"),
    ],
)
def test_function_that_cannot_be_called_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    """Module, name and kind."""
    (tmp_path / "check_broken.py").write_text("1 / 0")
    (tmp_path / "check_whole.py").write_text("number = 1\n\ndef reward(prompt, answer):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    check(_function("check_whole:reward"))
    with pytest.raises(ConfigError, match=words):
        check(_function(name))


def test_reward_model_must_reward(tmp_path: Path) -> None:
    """One output, of a model that classifies; a path that is not there names the key."""
    judge = RewardModelJudge(kind="reward_model", path=str(tiny_reward_model(tmp_path / "model")))
    check(judge)
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "id2label": {"0": "no", "1": "yes"}}))
    with pytest.raises(ModelError, match="num_labels=2"):
        check(judge)
    file.write_text(json.dumps({**content, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"rewards nothing.*LlamaForCausalLM"):
        check(judge)
    with pytest.raises(ModelError, match=r"set evaluate\.judge\.path"):
        check(dataclasses.replace(judge, path="/absent"))


def test_identity_is_what_decides_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an endpoint the text of the prompt, not where it lies; nothing of speed, limits, prices or keys."""
    prompt = tmp_path / "mine.txt"
    prompt.write_text("{prompt}{a}{b} Preferred:")
    judge = _endpoint(prompt=str(prompt))
    moved = prompt.rename(tmp_path / "moved.txt")
    moved.with_name("mine.txt").write_text(moved.read_text())
    others = {"parallel": 9, "max_requests": 3, "attempts": 1, "api_key_variable": "X", "price_per_million_input": 1.0}
    assert identity(judge) == identity(dataclasses.replace(judge, prompt=str(moved), **others))
    moved.write_text("{prompt}{a}{b} Better preferred:")
    for change in ({"prompt": str(moved)}, {"model": "n"}, {"temperature": 1.0}, {"url": "https://other/v1"}):
        assert identity(judge) != identity(dataclasses.replace(judge, **change))
    json.dumps(identity(judge))


def test_identity_of_a_function_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed module is another judge."""
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "identity_rewards.py"
    module.write_text("def reward(prompt, answer): return 1.0")
    first = identity(_function("identity_rewards:reward"))
    module.write_text("def reward(prompt, answer): return 2.0")
    assert identity(_function("identity_rewards:reward")) != first


def test_identity_of_a_reward_model_is_its_content(tmp_path: Path) -> None:
    """Not its place."""
    folders = [tiny_reward_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    one, same, other = (identity(RewardModelJudge(kind="reward_model", path=str(folder))) for folder in folders)
    assert one == same
    assert one != other


def test_paths_of_judges_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder, because workers run elsewhere; hub names and the names of defaults stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def read(judge: str) -> Any:
        return parse_config(f"model: {{path: m}}\nprepare: {{path: p}}\nevaluate: {{judge: {judge}}}").evaluate.judge

    assert read("{kind: reward_model, path: here}").path == str(tmp_path / "here")
    assert read("{kind: reward_model, path: org/name}").path == "org/name"
    assert read("{kind: endpoint, url: u, model: m, prompt: mine.txt}").prompt == str(tmp_path / "mine.txt")
    assert read("{kind: endpoint, url: u, model: m, prompt: summary}").prompt == "summary"
    assert read("{kind: function, function: a:b}").function == "a:b"
