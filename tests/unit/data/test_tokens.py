"""Pairs to token ids: prompt and answer apart, one end of turn, cuts that are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from dpo_train.data.pairs import Message, PreferencePair, Rejection, TokenPair
from dpo_train.data.tokens import PairTokenizer, load_tokenizer
from dpo_train.errors import ModelError
from tests.tiny import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Lone surrogates never come here (data/validate.py), and the special tokens have a test of their own.
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \naeö"), min_size=1, max_size=20)


def _pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair((Message("user", prompt),), chosen, rejected, group="g")


def _encoder(tokenizer: Any = TOKENIZER, template: str = "chat", prompt: int = 999, answer: int = 999) -> PairTokenizer:
    return PairTokenizer(tokenizer, template=template, max_prompt_tokens=prompt, max_answer_tokens=answer)


def _encode(encoder: PairTokenizer, *texts: str) -> tuple[TokenPair, int]:
    outcome = encoder.encode(_pair(*texts))
    assert not isinstance(outcome, Rejection), outcome
    return outcome


@pytest.fixture(scope="module")
def bos_tokenizer() -> Any:
    """One that, like Llama's, puts BOS before every text it is given with special tokens."""
    return _with_special_tokens(f"{BOS} $A", BOS)


def _with_special_tokens(form: str, *names: str) -> Any:
    tokenizer = tiny_tokenizer()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    return tokenizer


def test_chat_pair_is_the_template_cut_where_the_answer_begins() -> None:
    """Written out: the prompt ends after the assistant's header, the answer after its end of turn."""
    pair, cut = _encode(_encoder(), "tell me", "it is kind", "it is rude")
    assert TOKENIZER.decode(pair.prompt_ids) == f"{BOS}user\ntell me{EOS}\n{BOS}assistant\n"
    assert TOKENIZER.decode(pair.chosen_ids) == f"it is kind{EOS}"
    assert TOKENIZER.decode(pair.rejected_ids) == f"it is rude{EOS}"
    assert cut == 0
    assert pair.pair_id == _pair("tell me", "it is kind", "it is rude").pair_id


@pytest.mark.parametrize("template", ["chat", "plain"])
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
def test_no_token_spans_the_border_and_the_turn_ends_once(
    template: str, prompt: str, chosen: str, rejected: str
) -> None:
    """Prompt ids depend on the prompt alone; an answer's ids are its own text's and one EOS, the last."""
    outcome = _encoder(template=template).encode(_pair(prompt, chosen, rejected))
    if chosen == rejected:
        assert isinstance(outcome, Rejection)
        return
    pair, cut = outcome
    rendered = TOKENIZER.decode(pair.prompt_ids)
    assert rendered == (f"{BOS}user\n{prompt}{EOS}\n{BOS}assistant\n" if template == "chat" else prompt)
    assert pair.prompt_ids.tolist() == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    for text, ids in ((chosen, pair.chosen_ids.tolist()), (rejected, pair.rejected_ids.tolist())):
        assert TOKENIZER.decode(ids) == text + EOS
        assert ids.count(TOKENIZER.eos_token_id) == 1
        assert ids[-1] == TOKENIZER.eos_token_id
    assert cut == 0


def test_border_that_a_joint_tokenisation_would_merge_stays() -> None:
    """ "ques" + "tion" is one token when written together; apart it is what generation sees."""
    assert len(TOKENIZER("question")["input_ids"]) == 1
    pair, _ = _encode(_encoder(template="plain"), "ques", "tion", "t")
    assert pair.prompt_ids.tolist() == TOKENIZER("ques")["input_ids"]
    assert pair.chosen_ids.tolist() == [*TOKENIZER("tion")["input_ids"], TOKENIZER.eos_token_id]


@given(limit=st.integers(1, 12), chosen=TEXT, rejected=TEXT)
def test_long_answer_is_cut_at_its_end_without_eos_and_counted(limit: int, chosen: str, rejected: str) -> None:
    """A cut answer is the beginning of the whole one; it did not end there, so it has no EOS."""
    if chosen == rejected:
        return
    whole, _ = _encode(_encoder(), "hi", chosen, rejected)
    outcome = _encoder(answer=limit).encode(_pair("hi", chosen, rejected))
    wanted = [whole.chosen_ids[:limit].tolist(), whole.rejected_ids[:limit].tolist()]
    if wanted[0] == wanted[1]:
        assert outcome == Rejection("identical_after_truncation")
        return
    pair, cut = outcome
    assert [pair.chosen_ids.tolist(), pair.rejected_ids.tolist()] == wanted
    assert cut == sum(len(ids) > limit for ids in (whole.chosen_ids, whole.rejected_ids))
    for ids, full in ((pair.chosen_ids, whole.chosen_ids), (pair.rejected_ids, whole.rejected_ids)):
        assert (ids[-1] == TOKENIZER.eos_token_id) == (len(full) <= limit)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_end_of_turn_written_inside_an_answer_does_not_end_it(template: str) -> None:
    """Such an answer is rejected, or loses nothing: never a second EOS, never text cut without being counted."""
    outcome = _encoder(template=template).encode(_pair("hi", f"kind{EOS}rude", "cold"))
    if not isinstance(outcome, Rejection):
        ids = outcome[0].chosen_ids.tolist()
        assert ids.count(TOKENIZER.eos_token_id) == 1
        assert "rude" in TOKENIZER.decode(ids)


def test_prompt_at_the_limit_is_used_and_one_token_more_is_rejected() -> None:
    """A cut prompt would be another question."""
    pair, _ = _encode(_encoder(), "tell me", "kind", "rude")
    length = len(pair.prompt_ids)
    assert not isinstance(_encoder(prompt=length).encode(_pair("tell me", "kind", "rude")), Rejection)
    outcome = _encoder(prompt=length - 1).encode(_pair("tell me", "kind", "rude"))
    assert outcome == Rejection("prompt_too_long", f"{length} tokens, at most {length - 1}")


@pytest.mark.parametrize("form", [f"{BOS} $A", f"{BOS} $A {EOS}"], ids=["bos", "bos-and-eos"])
def test_plain_prompt_gets_one_bos_and_answers_none(form: str) -> None:
    """The prompt goes on, so an EOS that the tokenizer adds to every text is taken off again."""
    tokenizer = _with_special_tokens(form, BOS, EOS)
    pair, _ = _encode(_encoder(tokenizer, "plain"), "tell me", "kind", "rude")
    text = TOKENIZER("tell me", add_special_tokens=False)["input_ids"]
    assert pair.prompt_ids.tolist() == [tokenizer.bos_token_id, *text]
    assert pair.chosen_ids.tolist() == [*TOKENIZER("kind")["input_ids"], tokenizer.eos_token_id]


def test_chat_prompt_gets_no_second_bos(bos_tokenizer: Any) -> None:
    """The template writes its own; the tokenizer's would come twice."""
    pair, _ = _encode(_encoder(bos_tokenizer), "tell me", "kind", "rude")
    assert pair.prompt_ids.tolist()[0] == bos_tokenizer.bos_token_id
    assert pair.prompt_ids.tolist()[1] != bos_tokenizer.bos_token_id


def test_template_that_writes_no_end_still_ends_the_answer() -> None:
    """EOS is added where the template has none: without it the policy never learns to stop."""
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=bare + "{% if add_generation_prompt %}assistant: {% endif %}")
    pair, _ = _encode(_encoder(tokenizer), "hi", "kind", "rude")
    assert tokenizer.decode(pair.chosen_ids) == f"kind\n{EOS}"


def test_refusal_of_a_template_is_a_rejection_with_its_words() -> None:
    """Many templates raise on a system turn or on roles that do not alternate."""
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system turn, please') }}")
    outcome = _encoder(tokenizer).encode(_pair("hi", "a", "b"))
    assert outcome == Rejection("template_refused", "no system turn, please")


def test_template_that_rewrites_the_prompt_is_a_rejection() -> None:
    """If the prompt changes once an answer follows, no cut between them is right."""
    tokenizer = tiny_tokenizer(chat_template="{{ messages | length }}{{ messages[-1]['content'] }}")
    outcome = _encoder(tokenizer).encode(_pair("hi", "a", "b"))
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "template_refused"
    assert "changes the prompt" in outcome.detail


def test_chat_without_a_template_is_an_error() -> None:
    """A base model: the message says what to set."""
    with pytest.raises(ModelError, match=r"prepare\.template=plain"):
        _encoder(tiny_tokenizer(chat_template=None))


def test_tokenizer_of_a_model_folder_is_loaded(model_folder: Path) -> None:
    """The folder's tokenizer is the one that was written."""
    tokenizer = load_tokenizer(model_folder)
    assert tokenizer("it is kind")["input_ids"] == TOKENIZER("it is kind")["input_ids"]
    assert tokenizer.chat_template == TOKENIZER.chat_template


def test_tokenizer_that_is_missing_or_has_no_eos_is_an_error(tmp_path: Path) -> None:
    """Without EOS no answer would have an end."""
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    tiny_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
