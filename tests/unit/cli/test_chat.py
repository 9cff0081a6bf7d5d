"""`dpo chat`: who takes part, what is printed, and a conversation at a real terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from dpo_train.cli import chat, main
from dpo_train.config import ModelConfig
from dpo_train.data.tokens import TokenOptions
from dpo_train.evaluate.chat import Said, Speaker
from dpo_train.model.load import load_policy
from tests.command import DPO
from tests.projects import Project, project

__all__ = ["project"]

SHORT = ("--max-tokens", "6")


def speaker(folder: Path, temperature: float = 0.7, max_tokens: int = 6) -> Speaker:
    return Speaker(
        load_policy(ModelConfig(path=str(folder)), device=torch.device("cpu")),
        AutoTokenizer.from_pretrained(folder),
        TokenOptions(max_prompt_tokens=64, max_answer_tokens=64),
        temperature=temperature,
        max_tokens=max_tokens,
        seed=0,
    )


def blocks(text: str) -> list[list[str]]:
    """The turns that were printed, each its lines."""
    return [block.splitlines() for block in text.strip().split("\n\n")]


def test_prompts_are_answered_by_every_model(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """The conversation goes to standard output, who takes part to standard error; the policy is the challenger."""
    assert main(["chat", str(project.file), "--prompt", "tell me", "--prompt", "more", *SHORT]) == 0

    shown = capsys.readouterr()
    turns = blocks(shown.out)
    assert [turn[0] for turn in turns] == ["you: tell me", "you: more"]
    names = [[line.partition(":")[0] for line in turn[1:] if ": " in line] for turn in turns]
    assert all(turn[:1] == ["champion"] and {"challenger", "reference"} <= set(turn) for turn in names)
    assert shown.err.splitlines()[-4:] == [
        "policy is the same model as challenger",
        "champion: dpo-policy version 1",
        "challenger: dpo-policy version 2",
        f"reference: {project.config.model.path}",
    ]


def test_what_is_missing_is_named_and_left_out(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the models asked for, those that are there answer."""
    assert main(["chat", str(project.file), "--models", "7,reference", "--prompt", "tell me", *SHORT]) == 0
    shown = capsys.readouterr()
    assert "no 7: dpo-policy has no version '7'" in shown.err
    assert "reference: " in shown.out

    assert main(["chat", str(project.file), "--models", "7", "--prompt", "tell me"]) == 2
    assert "There is no model to talk to. Got: no 7: " in capsys.readouterr().err


def test_lines_of_standard_input_are_turns(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words are answered differently later in a conversation, and alike at the beginning of another."""
    monkeypatch.setattr("sys.stdin", io.StringIO("tell me\n\ntell me\n/reset\ntell me\n"))
    assert main(["chat", str(project.file), "--models", "champion", *SHORT]) == 0

    first, second, again = blocks(capsys.readouterr().out)
    assert first[0] == second[0] == "you: tell me"
    assert first == again != second


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "-1"), ("--temperature", "warm"), ("--max-tokens", "0")]
)
def test_wrong_options_are_refused(project: Project, option: str, value: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(SystemExit) as caught:
        main(["chat", str(project.file), option, value])
    assert caught.value.code == 2


def test_control_characters_do_not_reach_the_terminal(model_folder: Path) -> None:
    """At temperature 1000 a model that knows all bytes says some of them; each is shown as a replacement character."""
    said = speaker(model_folder, temperature=1000.0, max_tokens=100).answer("tell me").text
    shown = chat._answer("one", speaker(model_folder, temperature=1000.0, max_tokens=100), "tell me", 100)

    assert not said.replace("\n", "").isprintable()
    assert shown.replace("\n", "").isprintable()
    assert shown.endswith(" ... (cut off after 100 tokens)")


@pytest.mark.parametrize(("width", "beside"), [(2 * chat.COLUMN, True), (2 * chat.COLUMN - 1, False)])
def test_answers_stand_side_by_side_where_there_is_room(model_folder: Path, width: int, beside: bool) -> None:
    """Two models: from 72 characters on their names are in one line."""
    console = Console(file=io.StringIO(), width=width)
    chat._exchange(console, {"first": speaker(model_folder), "second": speaker(model_folder)}, "tell me", 6)

    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("first" in line and "second" in line for line in lines) is beside
    assert any("second" in line for line in lines)


class Impatient(Speaker):
    """Somebody presses Ctrl-C when it has just answered."""

    def answer(self, text: str) -> Said:
        super().answer(text)
        raise KeyboardInterrupt


def test_interrupted_turn_is_taken_back_by_all(model_folder: Path) -> None:
    """Otherwise the models would go on with different conversations."""
    patient, impatient = speaker(model_folder), speaker(model_folder)
    impatient.__class__ = Impatient
    console = Console(file=io.StringIO())

    chat._exchange(console, {"first": patient, "second": impatient}, "tell me", 6)

    assert patient.history == impatient.history == ()
    assert "taken back" in console.file.getvalue()  # type: ignore[attr-defined]


def test_conversation_at_a_terminal(project: Project) -> None:
    """Two turns, a look at who is who, a new beginning, and out; nothing of the libraries' own is shown."""
    terminal, child_side = pty.openpty()
    command = [*DPO, "chat", str(project.file), "--models", "champion,reference", *SHORT]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        command, stdin=child_side, stdout=child_side, stderr=child_side, env=environment, start_new_session=True
    ) as process:
        os.close(child_side)
        read = _Reader(terminal)
        greeting = read.until("you> ")
        answers = []
        for line in ("tell me about the cat", "and the dog", "/models", "/reset", "tell me about the cat"):
            os.write(terminal, f"{line}\n".encode())
            answers.append(read.until("you> "))
        os.write(terminal, b"/quit\n")
        assert process.wait() == 0
    os.close(terminal)

    assert "champion: dpo-policy version 1" in greeting
    assert "/reset begins anew" in greeting
    assert not [word for word in ("Warning", "Loading weights", "alembic", "INFO") if word in greeting]
    first, second, models, _, again = answers
    assert all("champion" in answer and "reference" in answer and "┃" in answer for answer in (first, second, again))
    assert "champion: dpo-policy version 1" in models
    assert first[first.index("┏") :] == again[again.index("┏") :] != second[second.index("┏") :]


class _Reader:
    """What the other side of a terminal shows."""

    def __init__(self, descriptor: int) -> None:
        self._read: Callable[[], bytes] = lambda: os.read(descriptor, 1 << 16)

    def until(self, text: str) -> str:
        """All up to this text at the end; a process that ends first raises an OSError."""
        shown = b""
        while not shown.decode(errors="replace").endswith(text):
            shown += self._read()
        return shown.decode(errors="replace")
