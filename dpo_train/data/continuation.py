"""Texts to token ids, where a text may go on from another one.

Prompt and answer are tokenised apart, so that no token spans their border. Some tokenizers mark the beginning of a text
(SentencePiece's "▁", GPT-2 with ``add_prefix_space``), and an answer by itself would get a mark that generation after
the prompt never sees. So there are two copies of a tokenizer: ``start`` as it is, and ``middle`` without the mark.
How an answer goes on depends on how its prompt ends:

    prompt ends in                      the answer is read
    an added token such as <|end|>      by start, behind that token, which is then taken off (white space that the token
                                        swallows is swallowed here too)
    anything else                       by middle, behind the white space at the prompt's end that gave no token
    nothing at all                      by start
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_train.errors import ModelError

# (before, after): where their joint tokens have the border, the tokens after it must be those of ``after`` by itself.
PROBES = (
    ("It is so:", "Hello the world"),
    ("It is so:", " Hello the  world\n"),
    ("It is so:\n", "Hello the world, 12 kinds."),
    ("It is so: ", "hello"),
    ("Yes", ", no"),
)


class Context(NamedTuple):
    """How the text before an answer ends: ``lead`` is read with the answer, then ``drop`` tokens are taken off."""

    lead: str = ""
    drop: int = 0
    middle: bool = True


class TextEncoder:
    """Token ids without special tokens, of whole batches of texts at a time.

    Neither padding nor truncation settings of the tokenizer have any part in it.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        ModelError: it cannot be told how the tokenizer reads a text that goes on from another one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start, self._middle, drops = _copies(tokenizer)
        self._added: dict[int, Any] = tokenizer.added_tokens_decoder
        # An added token with rstrip swallows the white space behind it.
        swallows = any(token.rstrip for token in self._added.values())
        self._contextual = self._start is None or self._middle is not self._start or drops or swallows
        self._check()

    def prompts(self, texts: Sequence[str]) -> list[tuple[list[int], Context]]:
        """Ids of texts that stand at the beginning, each with how it ends."""
        if not self._contextual:
            return [(ids, Context()) for ids in self._ids(self._start, texts)]
        if self._start is None:
            return [(ids, self._context_of_ids(ids)) for ids in self._ids(None, texts)]
        return [(e.ids, self._context(text, e)) for text, e in zip(texts, self._encodings(texts), strict=True)]

    def continuations(self, texts: Sequence[str], contexts: Sequence[Context]) -> list[list[int]]:
        """Ids of texts that go on from the end of another one."""
        if not self._contextual:
            return self._ids(self._start, texts)
        ids: list[list[int]] = [[]] * len(texts)
        for middle, backend in ((True, self._middle), (False, self._start)):
            places = [place for place, context in enumerate(contexts) if context.middle == middle]
            found = self._ids(backend, [contexts[place].lead + texts[place] for place in places])
            for place, whole in zip(places, found, strict=True):
                ids[place] = whole[contexts[place].drop :]
        return ids

    def _ids(self, backend: Any, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if backend is None:
            return _ids_by(self._tokenizer, texts)
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        found: list[Any] = self._start.encode_batch(list(texts), add_special_tokens=False)
        return found

    def _context(self, text: str, encoding: Any) -> Context:
        last = len(encoding.ids) - 1
        if last < 0:
            return Context(middle=False)
        start, end = encoding.token_to_chars(last)
        # Byte fallback may write the id of an added token <0x30> for a "0", which begins no new piece.
        token = self._added.get(encoding.ids[last])
        if token is not None and str(token) in text[start:]:
            return Context(text[start:], drop=1, middle=False)
        return Context(text[end:])

    def _context_of_ids(self, ids: list[int]) -> Context:
        if ids and (token := self._added.get(ids[-1])) is not None:
            return Context(str(token), drop=1, middle=False)
        return Context(middle=bool(ids))

    def _check(self) -> None:
        special = [token for token in (self._tokenizer.bos_token, self._tokenizer.eos_token) if token]
        for before, after in (*PROBES, *((token, text) for token in special for text in ("Hello the world", "\n1"))):
            ((head, context),) = self.prompts([before])
            ((joint, _),) = self.prompts([before + after])
            if joint[: len(head)] != head:
                continue  # a token spans the border; apart is what generation sees
            if (tail := self.continuations([after], [context])[0]) != joint[len(head) :]:
                raise ModelError(
                    "It cannot be told how this tokenizer reads an answer that goes on from its prompt",
                    got=f"{tail} for {after!r} behind {before!r}",
                    expected=f"{joint[len(head) :]}, as in the joint text",
                    fix="use the model's fast tokenizer (tokenizer.json)",
                )


def _copies(tokenizer: Any) -> tuple[Any, Any, bool]:
    """The backend by itself, one that does not mark the beginning of a text, and whether they may drop characters.

    (None, None, False) if there is no backend.
    """
    from tokenizers import Tokenizer

    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # written in Python, as a whole or (to_str fails) in part: read through the tokenizer itself
        return None, None, False
    state |= {"padding": None, "truncation": None}
    # It would add special tokens, which are none of our business here, and trims white space off the offsets.
    state["post_processor"] = None
    before = json.dumps(state)
    start = Tokenizer.from_str(before)
    start.encode_special_tokens = tokenizer.split_special_tokens
    probes = [part for probe in PROBES for part in probe]
    if [e.ids for e in start.encode_batch_fast(probes, add_special_tokens=False)] != _ids_by(tokenizer, probes):
        return None, None, False  # its Python class does more than its backend
    drops = any(not _keeps_all(part) for part in _parts(state["normalizer"], "normalizers"))
    _unmark(state)
    after = json.dumps(state)
    if after == before:
        return start, start, drops
    middle = Tokenizer.from_str(after)
    middle.encode_special_tokens = tokenizer.split_special_tokens
    return start, middle, drops


def _keeps_all(normalizer: dict[str, Any]) -> bool:
    """Whether no character disappears without another in its place."""
    return normalizer["type"] in {"NFC", "NFD", "NFKC", "NFKD"} or bool(
        normalizer["type"] == "Replace" and normalizer["content"]
    )


def _ids_by(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False
    )["input_ids"]
    return found


def _unmark(state: dict[str, Any]) -> None:
    """Takes out of a serialised tokenizer what marks the beginning of a text."""
    normalizers = [part for part in _parts(state["normalizer"], "normalizers") if part["type"] != "Prepend"]
    steps = _parts(state["pre_tokenizer"], "pretokenizers")
    marking = [step for step in steps if step["type"] == "Metaspace" and step["prepend_scheme"] != "never"]
    if marking and any(step["type"] == "WhitespaceSplit" for step in steps):
        # T5: each word is cut out, then marked. The same words come of marking every run of white space instead.
        steps = [step for step in steps if step["type"] != "WhitespaceSplit"]
        normalizers.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
        normalizers.append({"type": "Strip", "strip_left": False, "strip_right": True})
    for step in marking:
        step["prepend_scheme"] = "never"
    for step in steps:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    if state["normalizer"] is not None or normalizers:
        state["normalizer"] = _joined(normalizers, state["normalizer"], "normalizers")
    if state["pre_tokenizer"] is not None:
        state["pre_tokenizer"] = _joined(steps, state["pre_tokenizer"], "pretokenizers")


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for inner in component[key] for part in _parts(inner, key)]
    return [component]


def _joined(parts: list[dict[str, Any]], before: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    """The parts as one component, and as it was where nothing changed, so that equal states stay equal."""
    if before is not None and parts == _parts(before, key):
        return before
    return {"type": "Sequence", key: parts}
