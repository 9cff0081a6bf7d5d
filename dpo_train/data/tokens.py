"""Pairs to token ids: one canonical tokenisation of prompt and answer.

    pair -> chat.py: texts of prompt and answers -> continuation.py: ids -> cut to their limits -> EncodedPair
                                                                                      or else a Rejection

Prompt and answer are tokenised apart, so that no token spans their border and training sees the ids that generation
sees. The answer ends with the end-of-turn token, except where it was cut. docs/tokens.md has the cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_train.data.chat import Render, Texts, chat_texts, plain_texts, spells, template_variables, turn_closing
from dpo_train.data.continuation import Context, TextEncoder
from dpo_train.data.pairs import Ids, Message, PreferencePair, Rejection, TokenPair
from dpo_train.errors import ConfigError, ModelError, first_line

Truncation = Literal["keep_start", "keep_end", "drop"]

# What apply_chat_template itself hands to a template, besides the special tokens.
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How pairs become tokens; the meanings are those of PrepareConfig.

    ``chat_template`` is the text of the user's own template, not its path.
    """

    template: Literal["chat", "plain"] = "chat"
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int
    max_answer_tokens: int
    prompt_truncation: Truncation = "drop"
    answer_truncation: Truncation = "keep_start"


class EncodedPair(NamedTuple):
    """Token ids of a pair, and which of its three texts were cut."""

    tokens: TokenPair
    truncated_prompt: bool
    truncated_chosen: bool
    truncated_rejected: bool


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-sequence token", expected="eos_token to be set")
    return tokenizer


class PairTokenizer:
    """Tokenises pairs.

    Args:
        tokenizer: a Hugging Face tokenizer.
        options: template and limits.

    Raises:
        ModelError: "chat" is asked for and there is no chat template, or it is broken; or see TextEncoder.
        ConfigError: an option that the template does not read.
    """

    def __init__(self, tokenizer: Any, options: TokenOptions) -> None:
        self._options = options
        self._render = _renderer(tokenizer, options) if options.template == "chat" else None
        if self._render is None and (options.chat_template is not None or options.template_options):
            raise ConfigError(
                "prepare.template=plain reads neither chat_template nor template_options",
                fix="set prepare.template=chat, or leave them out",
            )
        self._encoder = TextEncoder(tokenizer)
        self._opening = _opening(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id
        self._eos_token: str = tokenizer.eos_token
        self._control = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._is_blank = functools.lru_cache(maxsize=None)(lambda index: not tokenizer.decode([index]).strip())

    def encode(self, pair: PreferencePair) -> EncodedPair | Rejection:
        """Token ids, or why the pair cannot be used."""
        return self.encode_many([pair])[0]

    def encode_many(self, pairs: Sequence[PreferencePair]) -> list[EncodedPair | Rejection]:
        """The same for many pairs at a time, which is faster: each kind of text is one call of the tokenizer."""
        found: list[EncodedPair | Rejection | _Written] = [self._write(pair) for pair in pairs]
        written = [item for item in found if isinstance(item, _Written)]
        # Pairs of one ranking share their prompt and their answers.
        prompts = _once(self._encoder.prompts, [item.texts.prompt for item in written])
        texts = [
            (text, context)
            for item, (_, context) in zip(written, prompts, strict=True)
            for text in (item.texts.chosen, item.texts.rejected)
        ]
        answers = _once(lambda keys: self._encoder.continuations(*zip(*keys, strict=True)), texts)
        encoded = (
            self._encoded(item, prompt_ids, answers[2 * place : 2 * place + 2])
            for place, (item, (prompt_ids, _)) in enumerate(zip(written, prompts, strict=True))
        )
        return [next(encoded) if isinstance(item, _Written) else item for item in found]

    def _write(self, pair: PreferencePair) -> _Written | Rejection:
        try:
            answers = [self._without_end(answer) for answer in (pair.chosen, pair.rejected)]
            for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                if spells(answer, self._eos_token):
                    return Rejection("end_token_in_answer", f"{name} spells {self._eos_token}")
                if not (answer.content.strip() or answer.extra):
                    return Rejection("empty_answer", name)
            pair_ = replace(pair, chosen=answers[0], rejected=answers[1])
            return _Written(pair, plain_texts(pair_) if self._render is None else chat_texts(self._render, pair_))
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            return Rejection("template_refused", _words(error))

    def _without_end(self, answer: Message) -> Message:
        """The answer without the EOS that some data has written behind it; it gets its one EOS like any other."""
        text = answer.content.rstrip()
        return replace(answer, content=text.removesuffix(self._eos_token)) if text.endswith(self._eos_token) else answer

    def _encoded(self, item: _Written, prompt_ids: list[int], answers: Sequence[list[int]]) -> EncodedPair | Rejection:
        prompt = self._cut_prompt(item.pair, self._opened(prompt_ids))
        if isinstance(prompt, Rejection):
            return prompt
        ended = []
        for name, message, ids in zip(
            ("chosen", "rejected"), (item.pair.chosen, item.pair.rejected), answers, strict=True
        ):
            whole = self._ended(ids, message, name)
            if (
                not isinstance(whole, Rejection) and len(whole) == 1
            ):  # its end alone: a template may read nothing of what the answer has
                return Rejection("empty_answer", f"the chat template shows nothing of {name}")
            answer = whole if isinstance(whole, Rejection) else self._cut_answer(whole, name)
            if isinstance(answer, Rejection):
                return answer
            ended.append(answer)
        (chosen_ids, cut_chosen), (rejected_ids, cut_rejected) = ended
        if chosen_ids == rejected_ids:
            if cut_chosen or cut_rejected:
                return Rejection("identical_after_truncation", f"the same {len(chosen_ids)} tokens")
            return Rejection("identical_answers", "the same tokens")
        tokens = TokenPair(item.pair.pair_id, _array(prompt[0]), _array(chosen_ids), _array(rejected_ids))
        return EncodedPair(tokens, prompt[1], cut_chosen, cut_rejected)

    def _opened(self, ids: list[int]) -> list[int]:
        """The prompt's ids with exactly one BOS: a template's own, or the one that the tokenizer asks for."""
        if self._render is None:
            ids = self._opening + ids
        repeated = 0
        while ids[repeated : repeated + 2] == [self._bos, self._bos]:
            repeated += 1
        return ids[repeated:]

    def _ended(self, ids: list[int], message: Message, name: str) -> list[int] | Rejection:
        """The answer up to the end of its turn. What a template writes behind it is never generated."""
        if self._eos in ids:
            return ids[: len(ids) - ids[::-1].index(self._eos)]
        if self._render is not None:
            last = next((place for place in reversed(range(len(ids))) if not self._is_blank(ids[place])), -1)
            if last >= 0 and (token := self._control.get(ids[last])) is not None:
                # This template ends turns with a token of its own, where generation stops too.
                if spells(message, token):
                    return Rejection("end_token_in_answer", f"{name} spells {token}")
                return ids[: last + 1]
        return [*ids, self._eos]

    def _cut_answer(self, ids: list[int], name: str) -> tuple[list[int], bool] | Rejection:
        most, mode = self._options.max_answer_tokens, self._options.answer_truncation
        if len(ids) <= most:
            return ids, False
        if mode == "drop":
            return Rejection("answer_too_long", f"{name}: {len(ids)} tokens, at most {most}")
        return (ids[:most] if mode == "keep_start" else ids[-most:]), True

    def _cut_prompt(self, pair: PreferencePair, ids: list[int]) -> tuple[list[int], bool] | Rejection:
        if not ids:
            return Rejection("empty_prompt", "no token left")
        most, mode = self._options.max_prompt_tokens, self._options.prompt_truncation
        if len(ids) <= most:
            return ids, False
        too_long = Rejection("prompt_too_long", f"{len(ids)} tokens, at most {most}")
        if mode == "drop":
            return too_long
        opening = self._opening if self._render is None else ids[:1] if ids[0] == self._bos else []
        room = most - len(opening)
        if mode == "keep_start":
            closing = self._closing_ids(pair, ids)
            if isinstance(closing, Rejection):
                return closing
            return too_long if room <= len(closing) else (ids[: most - len(closing)] + closing, True)
        if room <= 0:
            return too_long
        kept = ids[-room:]
        return (kept if opening and kept[: len(opening)] == opening else opening + kept), True

    def _closing_ids(self, pair: PreferencePair, ids: list[int]) -> list[int] | Rejection:
        """The prompt's own last ids that a cut at its end spares: the end of its turn, the header of the answer's."""
        if self._render is None:
            return []
        try:
            text = turn_closing(self._render, pair)
        except Exception as error:
            return Rejection("template_refused", _words(error))
        closing = [self._encoder.continuations([text], [Context(middle=middle)])[0] for middle in (True, False)]
        found = next((end for end in closing if ids[len(ids) - len(end) :] == end), None)
        return Rejection("prompt_too_long", "and its last turn ends inside a token") if found is None else found


@dataclass(frozen=True, slots=True)
class _Written:
    pair: PreferencePair
    texts: Texts


def _words(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__


def _array(ids: list[int]) -> Ids:
    return np.array(ids, dtype=np.int32)


def _once(read: Callable[[Any], Any], keys: Sequence[Any]) -> list[Any]:
    """``read`` of all keys, each different one read once."""
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    found = read(list(places)) if places else []
    return [found[places[key]] for key in keys]


def _opening(tokenizer: Any) -> list[int]:
    """The special ids that the tokenizer puts before a text; what it puts behind one does not concern a prompt."""
    text = "a"
    whole: list[int] = tokenizer(text, padding=False, truncation=False)["input_ids"]
    bare: list[int] = tokenizer(text, padding=False, truncation=False, add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(bare)] == bare), 0)]


def _renderer(tokenizer: Any, options: TokenOptions) -> Render:
    """apply_chat_template's own rendering, with all that is the same for every pair looked up once."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    own = options.chat_template
    if own is None and not tokenizer.chat_template:
        raise ModelError("The tokenizer has no chat template", fix="set prepare.template=plain, or use a chat model")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"": tokenizer.chat_template}
    templates = [own] if own is not None else list(named.values())
    special = tokenizer.special_tokens_map
    _check_options(templates, options.template_options, set(special), whose="your own" if own else "the tokenizer's")
    variables = {**special, **options.template_options}

    def render(turns: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        # A tokenizer may have one template for conversations with tools and one for those without.
        template = templates[0] if len(templates) == 1 else tokenizer.get_chat_template(None, tools)
        if tools is None and all(turn.keys() == _SAID for turn in turns):
            # Where turns are two texts each, render_jinja_template adds nothing: 21 microseconds without it, 31 with.
            given = {
                "messages": turns,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            return str(_compile_jinja_template(template).render(**given, **variables))
        _check_shown(template, turns, tools)
        (text,), _ = render_jinja_template(
            [turns], tools, chat_template=template, add_generation_prompt=add_generation_prompt, **variables
        )
        return str(text)

    return render


def _check_shown(template: str, turns: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> None:
    """What a template does not even name would be left out without a word."""
    unread = ["tools"] if tools and "tools" not in template else []
    for place, turn in enumerate(turns):
        for key in ("tool_calls", "function_call", *(_REASONING if place == len(turns) - 1 else ())):
            if turn.get(key) and key not in template:
                unread.append(key)
    if unread:
        raise ValueError(f"the chat template does not read {', '.join(unread)}; see prepare.chat_template")


_SAID = {"role", "content"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Templates leave the thoughts of earlier turns out; those of the answer are part of it."""


def _check_options(templates: Sequence[str], options: Mapping[str, Any], special: set[str], *, whose: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    read: set[str] = set()
    offered: set[str] = set()
    for template in templates:
        try:
            environment = _compile_jinja_template(template).environment
        except TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template ({whose}) is no Jinja: line {error.lineno}: {error.message}",
                fix="mend it; prepare.chat_template names a Jinja file to use instead of the tokenizer's own",
            ) from None
        all_read, not_set = template_variables(environment.parse(template))
        read |= all_read - set(environment.globals) - _OURS
        offered |= not_set - set(environment.globals) - _OURS
    for name in options:
        if name not in read:
            there = sorted(offered - special)
            raise ConfigError(
                f"prepare.template_options.{name}: the chat template ({whose}) reads no such variable",
                expected=", ".join(there) if there else "no options, for this template reads none",
            )
