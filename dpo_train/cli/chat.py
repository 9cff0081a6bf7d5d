"""`dpo chat`: the same conversation with several models, side by side."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_train import launch, storage
from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.cli.console import printable
from dpo_train.cli.quiet import quiet
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ModelError, UserError

if TYPE_CHECKING:
    from dpo_train.evaluate.chat import Speaker
    from dpo_train.named_models import NamedModel

HELP = "talk to champion, challenger, policy and reference side by side"

COLUMN = 36
"""Fewest characters of a column; in a narrower terminal the answers stand below each other."""

_COMMANDS = "/reset begins anew, /models says who is who, /quit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument(
        "--models",
        default="champion,challenger,policy,reference",
        metavar="NAMES",
        help="of these, by commas, also numbers of registered versions; what is not there is left out "
        "(default: %(default)s)",
    )
    parser.add_argument("--policy", metavar="DIR", help="output folder of train (default: the newest of the store)")
    parser.add_argument("--temperature", type=_temperature, default=0.7, help="0: greedy (default: %(default)s)")
    parser.add_argument("--max-tokens", type=_count, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the answers (default: the config's)")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="say this, print the answers and end; may be repeated"
    )


def _temperature(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no temperature (0, 0.7, ...)")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens (1, 2, ...)")
    return int(text)


def chat(arguments: argparse.Namespace) -> int:
    """Talks until the input ends. Answers go to standard output, everything else to standard error."""
    config = load_config(arguments.config, arguments.overrides)
    launch.use_storage(config)
    is_person = arguments.prompt is None and sys.stdin.isatty()
    with Console().status("loading the models") if is_person else contextlib.nullcontext():
        models, notes = _find(config, arguments)
        speakers = {model.name: _load(config, arguments, model) for model in models}
    for note in notes:
        print(printable(note), file=sys.stderr)
    if is_person:
        _talk(models, speakers, arguments.max_tokens)
    else:
        lines = arguments.prompt or (line.rstrip("\n") for line in sys.stdin)
        _recite(speakers, lines, arguments.max_tokens)
    return 0


def _find(config: RunConfig, arguments: argparse.Namespace) -> tuple[list[NamedModel], list[str]]:
    """The models that there are, each once; and in words which these are, and what is missing.

    Raises:
        ModelError: none is there.
    """
    from dpo_train import named_models

    names = list(dict.fromkeys(filter(None, map(str.strip, arguments.models.split(",")))))
    if {*names} - {named_models.POLICY, named_models.REFERENCE}:
        launch.check_tracking(config)
    policy = None if arguments.policy is None else _opened(arguments.policy)
    found: dict[str, NamedModel] = {}
    said = []
    for name in names:
        try:
            with quiet():
                model = named_models.find(config, name, policy)
        except UserError as error:
            said.append(f"no {name}: {error}")
            continue
        if (same := found.setdefault(model.digest, model)) is not model:
            said.append(f"{name} is the same model as {same.name}")
    if not found:
        raise ModelError("There is no model to talk to", got="; ".join(said) or "no names", fix="name one by --models")
    return list(found.values()), [*said, *(f"{model.name}: {model.about}" for model in found.values())]


def _opened(path: str) -> Artifact:
    return open_artifact(path if storage.is_remote(path) else str(Path(path).resolve()), "train")


def _load(config: RunConfig, arguments: argparse.Namespace, named: NamedModel) -> Speaker:
    with quiet():
        from dpo_train.data.folder import model_folder
        from dpo_train.data.tokens import load_tokenizer
        from dpo_train.evaluate.chat import Speaker
        from dpo_train.model.load import load_policy, select_device
        from dpo_train.stages.prepare_inputs import chat_template, token_options

        model = named.model
        return Speaker(
            load_policy(model, device=select_device(config.compute.device), weights=named.weights),
            load_tokenizer(model_folder(model.path), trust_remote_code=model.trust_remote_code),
            token_options(config.prepare, chat_template(config)),
            temperature=arguments.temperature,
            max_tokens=arguments.max_tokens,
            seed=config.seed if arguments.seed is None else arguments.seed,
        )


def _answer(name: str, speaker: Speaker, text: str, max_tokens: int) -> str:
    """What is shown of an answer. Control characters of a model must not reach the terminal."""
    try:
        with quiet():
            said = speaker.answer(text)
    except UserError as error:
        return f"({name} does not answer: {error})"
    shown = printable(said.text.expandtabs(4)) or "(nothing)"
    return f"{shown} ... (cut off after {max_tokens} tokens)" if said.truncated else shown


def _recite(speakers: dict[str, Speaker], lines: Iterable[str], max_tokens: int) -> None:
    """A conversation as plain text, for a file or a pipe."""
    for line in lines:
        if line.strip() == "/reset":
            _reset(speakers)
        elif line.strip():
            print(f"you: {printable(line)}", flush=True)
            for name, speaker in speakers.items():
                print(f"{name}: {_answer(name, speaker, line, max_tokens)}", flush=True)
            print(flush=True)


def _reset(speakers: dict[str, Speaker]) -> None:
    for speaker in speakers.values():
        speaker.history = ()


def _talk(models: Sequence[NamedModel], speakers: dict[str, Speaker], max_tokens: int) -> None:
    """A conversation with a person at a terminal."""
    console = Console(highlight=False)
    commands: dict[str, Callable[[], None]] = {
        "/reset": lambda: _reset(speakers),
        "/models": lambda: console.print(Text("\n".join(f"{model.name}: {model.about}" for model in models))),
    }
    console.print(f"[dim]{_COMMANDS}[/]")
    for line in _typed():
        if line == "/quit":
            return
        if line in commands:
            commands[line]()
        elif line.startswith("/"):
            console.print(f"[dim]{_COMMANDS}[/]")
        elif line:
            _exchange(console, speakers, line, max_tokens)


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and a history
    while True:
        try:
            yield input("you> ").strip()
        except EOFError:
            print()
            return


def _exchange(console: Console, speakers: dict[str, Speaker], line: str, max_tokens: int) -> None:
    """One turn of all models; Ctrl-C takes it back."""
    before = {name: speaker.history for name, speaker in speakers.items()}
    answers = {}
    try:
        for name, speaker in speakers.items():
            with console.status(f"{name} answers"):
                answers[name] = _answer(name, speaker, line, max_tokens)
    except KeyboardInterrupt:
        for name, speaker in speakers.items():
            speaker.history = before[name]
        console.print("[dim]taken back[/]")
        return
    console.print(_side_by_side(answers) if console.width >= COLUMN * len(answers) else _stacked(answers))


def _side_by_side(answers: dict[str, str]) -> Table:
    table = Table(expand=True)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    return table


def _stacked(answers: dict[str, str]) -> Text:
    return Text("\n\n").join(Text.assemble((name, "bold"), "\n", answer) for name, answer in answers.items())
