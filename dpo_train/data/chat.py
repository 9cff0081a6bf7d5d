"""Conversations to text, through a chat template: where the prompt ends and the answer begins.

The prompt is what generation would be given. The answer is what the template writes behind it when the answer's turn
follows. Where the template changes the prompt once an answer follows, there is no such place, and the pair is refused
with what was found; see docs/tokens.md for the one exception.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jinja2 import meta, nodes

from dpo_train.data.pairs import Message, PreferencePair

Turn = dict[str, Any]
Render = Callable[[list[Turn], list[Any] | None, bool], str]
"""(turns, tools, add_generation_prompt) -> text; raises whatever the template raises."""

# Thoughts that are opened and closed with nothing between, as models that may think write before an answer without.
EMPTY_THOUGHTS = re.compile(r"(?:<(\w+)>\s*</\1>|<\|(\w+)>\w*\s*<\2\|>)\s*\Z")

# A private-use character: no template writes it, and none strips it.
_PLACE = "\ue000\ue001\ue000"


class TemplateRefusedError(ValueError):
    """A pair cannot be written by this template; the message is the rejection's detail."""


class Texts(NamedTuple):
    """What is tokenised: the prompt with its generation header, and each answer up to whatever ends the text."""

    prompt: str
    chosen: str
    rejected: str


def chat_texts(render: Render, pair: PreferencePair) -> Texts:
    """The texts of a pair.

    Raises:
        TemplateRefusedError: the template changes the prompt once an answer follows, or does not show the answers.
    """
    turns, tools = [_turn(message) for message in pair.prompt], _tools(pair.tools)
    prompt = render(turns, tools, True)
    wholes = [render([*turns, _turn(answer)], tools, False) for answer in (pair.chosen, pair.rejected)]
    answers = [whole[len(prompt) :] for whole in wholes if whole.startswith(prompt)]
    if len(answers) < len(wholes):
        stem = render(turns, tools, False)
        answers = [_behind(prompt, stem, whole) for whole in wholes]
    if answers[0] == answers[1] and pair.chosen.content.strip() != pair.rejected.content.strip():
        raise TemplateRefusedError("the chat template writes both answers alike: it leaves out what they differ in")
    return Texts(prompt, *answers)


def turn_closing(render: Render, pair: PreferencePair) -> str:
    """What the template writes behind the prompt's last turn: its end, and the header of the answer.

    Raises:
        TemplateRefusedError: the template does not show the last turn.
    """
    turns = [_turn(message) for message in pair.prompt]
    text = render([*turns[:-1], turns[-1] | {"content": _PLACE}], _tools(pair.tools), True)
    _, found, closing = text.rpartition(_PLACE)
    if not found:
        raise TemplateRefusedError("the chat template does not show the last turn, so it cannot be cut")
    return closing


def plain_texts(pair: PreferencePair) -> Texts:
    """The texts of a pair as they stand.

    Raises:
        TemplateRefusedError: there are tools, which plain text has no place for.
    """
    messages = (*pair.prompt, pair.chosen, pair.rejected)
    if pair.tools or any("tool_calls" in json.loads(message.extra) for message in messages if message.extra):
        raise TemplateRefusedError("plain text has no place for tools and tool calls; they need a chat template")
    return Texts("".join(message.content for message in pair.prompt), pair.chosen.content, pair.rejected.content)


def spells(message: Message, text: str) -> bool:
    """Whether a message has this text in it, be it in a tool call."""
    return text in message.content or (
        bool(message.extra) and text in json.dumps(json.loads(message.extra), ensure_ascii=False)
    )


def template_variables(tree: nodes.Template) -> tuple[set[str], set[str]]:
    """The variables that a template may read from outside, and those of them that it does not set itself.

    A name that it sets in one branch and reads in another is of the first kind only, unless it asks whether the name is
    defined, as templates do for what they have a default for.
    """
    read = meta.find_undeclared_variables(tree)
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return read, (read - stored) | (read & asked)


def _behind(prompt: str, stem: str, whole: str) -> str:
    """The answer's text in ``whole``, where the header of the answer's turn may differ from the one in ``prompt``."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    if not (prompt.startswith(stem) and whole.startswith(stem)):
        raise TemplateRefusedError("the chat template changes the prompt once an answer follows")
    thoughts = EMPTY_THOUGHTS.search(prompt, len(stem))
    if thoughts and whole.startswith(prompt[: thoughts.start()]):
        # Generation is given empty thoughts and then writes the answer; so is training.
        answer = whole[thoughts.start() :]
        if not answer.startswith(thoughts[0][: thoughts[0].index(">") + 1]):
            return answer
        raise TemplateRefusedError("the chat template gives the prompt empty thoughts, and the answer brings its own")
    common = next(place for place, sign in enumerate(prompt) if not whole.startswith(sign, place))
    raise TemplateRefusedError(
        f"the chat template ends the prompt with {prompt[len(stem) :]!r}, of which {prompt[common:]!r} is not there "
        "once an answer follows; see prepare.template_options and prepare.chat_template"
    )


def _turn(message: Message) -> Turn:
    turn = {"role": message.role, "content": message.content}
    if message.extra:
        # apply_chat_template drops keys without a value, and so do we.
        turn |= {
            key: value for key, value in json.loads(message.extra).items() if value is not None and key not in turn
        }
    return turn


@functools.lru_cache(maxsize=64)  # data sets repeat the same few lists of tools, which are long
def _tools(text: str) -> list[Any] | None:
    tools: list[Any] | None = json.loads(text) if text else None
    return tools
