"""Pairs to token ids: prompt and answer apart, one BOS, one end of turn, cuts that are told."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.tokens import EncodedPair, PairTokenizer, TokenOptions, load_tokenizer
from dpo_train.errors import ConfigError, ModelError
from tests.tiny import BOS, EOS, tiny_tokenizer
from tests.unit.data.tokenizer_kinds import KINDS, TEMPLATES, make

TOKENIZER = tiny_tokenizer()
# Lone surrogates never come here (data/validate.py), and the special tokens have tests of their own.
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \naeö"), min_size=1, max_size=20)
ANSWER = TEXT.filter(str.strip)
# Qwen3's way: earlier thoughts are dropped, and without thinking the prompt ends with empty ones.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.thoughts %}<think>\n{{ m.thoughts }}\n"
    "</think>\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n"
    "{% elif thinking is defined %}<think>\n{% endif %}{% endif %}"
)


def pair_of(prompt: str | tuple[Message, ...], chosen: str | Message, rejected: str | Message) -> PreferencePair:
    """A pair of one user turn, or of these turns."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    answers = [Message("assistant", answer) if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return PreferencePair(turns, *answers, group="g")


def encoder(tokenizer: Any = TOKENIZER, **options: Any) -> PairTokenizer:
    """One with wide limits, unless they are given."""
    return PairTokenizer(tokenizer, TokenOptions(**{"max_prompt_tokens": 999, "max_answer_tokens": 999} | options))


def encode(tokenizer: PairTokenizer, *texts: Any) -> EncodedPair:
    """Of a pair that is not rejected."""
    outcome = tokenizer.encode(pair_of(*texts))
    assert isinstance(outcome, EncodedPair), outcome
    return outcome


@functools.cache
def kept(kind: str, template: str | None) -> tuple[Any, PairTokenizer]:
    """A tokenizer of KINDS and its encoder, made once for all examples; None is plain text."""
    tokenizer = make(kind, template)
    return tokenizer, encoder(tokenizer, template="chat" if template else "plain")


def ids_of(outcome: EncodedPair) -> list[list[int]]:
    """Prompt, chosen, rejected."""
    return [
        outcome.tokens.prompt_ids.tolist(),
        outcome.tokens.chosen_ids.tolist(),
        outcome.tokens.rejected_ids.tolist(),
    ]


# -- what a pair becomes


def test_chat_pair_is_the_template_cut_where_the_answer_begins() -> None:
    """Written out: the prompt ends after the assistant's header, the answer after its end of turn."""
    outcome = encode(encoder(), "tell me", "it is kind", "it is rude")
    pair = outcome.tokens
    assert TOKENIZER.decode(pair.prompt_ids) == f"{BOS}user\ntell me{EOS}\n{BOS}assistant\n"
    assert TOKENIZER.decode(pair.chosen_ids) == f"it is kind{EOS}"
    assert TOKENIZER.decode(pair.rejected_ids) == f"it is rude{EOS}"
    assert outcome[1:] == (False, False, False)
    assert pair.pair_id == pair_of("tell me", "it is kind", "it is rude").pair_id
    assert pair.prompt_ids.dtype == "int32"


@pytest.mark.parametrize("template", ["chat", "plain"])
@given(prompt=TEXT, chosen=ANSWER, rejected=ANSWER)
def test_no_token_spans_the_border_and_the_turn_ends_once(
    template: str, prompt: str, chosen: str, rejected: str
) -> None:
    """Prompt ids depend on the prompt alone; an answer's ids are its own text's and one EOS, the last."""
    outcome = encoder(template=template).encode(pair_of(prompt, chosen, rejected))
    if chosen == rejected:
        assert outcome == Rejection("identical_answers", "the same tokens")
        return
    assert isinstance(outcome, EncodedPair)
    pair = outcome.tokens
    rendered = TOKENIZER.decode(pair.prompt_ids)
    assert rendered == (f"{BOS}user\n{prompt}{EOS}\n{BOS}assistant\n" if template == "chat" else prompt)
    assert pair.prompt_ids.tolist() == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    for text, ids in ((chosen, pair.chosen_ids.tolist()), (rejected, pair.rejected_ids.tolist())):
        assert TOKENIZER.decode(ids) == text + EOS
        assert ids.count(TOKENIZER.eos_token_id) == 1
        assert ids[-1] == TOKENIZER.eos_token_id
    assert outcome[1:] == (False, False, False)


def test_many_pairs_give_what_each_gives_by_itself() -> None:
    """Batching, and reading what pairs share only once, changes no id and no place; refusals stay where they were."""
    texts = ["kind", "rude", "cold", f"a{EOS}b", "kind"]
    pairs = [pair_of(f"tell me {place % 3}", texts[place % 5], texts[(place + 1) % 5]) for place in range(15)]
    tokenizer = encoder()
    together = tokenizer.encode_many(pairs)
    for pair, outcome in zip(pairs, together, strict=True):
        alone = tokenizer.encode(pair)
        assert type(alone) is type(outcome)
        if isinstance(outcome, EncodedPair) and isinstance(alone, EncodedPair):
            assert ids_of(outcome) == ids_of(alone)
            assert outcome.tokens.pair_id == pair.pair_id
    assert {type(outcome) for outcome in together} == {EncodedPair, Rejection}
    assert tokenizer.encode_many([]) == []


def test_padding_and_truncation_settings_of_the_tokenizer_change_nothing() -> None:
    """Whatever side it pads or cuts at, and whatever its file says of both."""
    expected = ids_of(encode(encoder(), "tell me about the cat", "it is kind and warm", "rude"))
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer(padding_side=side, truncation_side=side, model_max_length=5)
        tokenizer.backend_tokenizer.enable_padding(direction=side, length=50)
        tokenizer.backend_tokenizer.enable_truncation(3)
        assert ids_of(encode(encoder(tokenizer), "tell me about the cat", "it is kind and warm", "rude")) == expected


# -- the border of prompt and answer


def test_border_that_a_joint_tokenisation_would_merge_stays() -> None:
    """ "ques" + "tion" is one token when written together; apart it is what generation sees."""
    assert len(TOKENIZER("question")["input_ids"]) == 1
    pair = encode(encoder(template="plain"), "ques", "tion", "t").tokens
    assert pair.prompt_ids.tolist() == TOKENIZER("ques")["input_ids"]
    assert pair.chosen_ids.tolist() == [*TOKENIZER("tion")["input_ids"], TOKENIZER.eos_token_id]


@pytest.mark.parametrize("kind", ["llama2", "first", "always", "t5", "gpt2_prefix"])
@pytest.mark.parametrize(
    ("prompt", "answer", "first"),
    [("Tell me:", "Hello", "Hell"), ("Tell me:", " Hello", "▁Hello"), ("Tell me: ", "Hello", "Hell")],
)
def test_answer_gets_the_mark_of_a_new_word_only_where_there_is_a_space(
    kind: str, prompt: str, answer: str, first: str
) -> None:
    """Its own text would begin with "▁Hello": a space nobody wrote. T5 gives a prompt's last space to the answer."""
    tokenizer = make(kind, None)
    alone = tokenizer.convert_ids_to_tokens(tokenizer("Hello", add_special_tokens=False)["input_ids"])
    assert alone == ["ĠHello" if kind == "gpt2_prefix" else "▁Hello"]
    ids = ids_of(encode(encoder(tokenizer, template="plain"), prompt, answer, "no"))[1]
    if kind == "t5" and prompt.endswith(" "):
        first = "▁Hello"
    assert tokenizer.convert_ids_to_tokens(ids)[0] == (first.replace("▁", "Ġ") if kind == "gpt2_prefix" else first)


@pytest.mark.parametrize(("kind", "first"), [("llama2", "▁Hello"), ("always", "▁Hello"), ("first", "Hell")])
def test_answer_behind_an_added_token_begins_as_the_tokenizer_begins_there(kind: str, first: str) -> None:
    """The old SentencePiece form marks every piece between added tokens, and so its models write "▁Hello" there."""
    tokenizer = make(kind, "token")
    ids = ids_of(encode(encoder(tokenizer), "Tell me", "Hello", "no"))[1]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, None])
@settings(max_examples=15)
@given(prompt=TEXT, chosen=ANSWER, rejected=ANSWER)
def test_ids_are_the_joint_texts_wherever_its_tokens_have_the_border(
    kind: str, template: str | None, prompt: str, chosen: str, rejected: str
) -> None:
    """For every kind of tokenizer and every end of a prompt; the prompt is always what generation is given."""
    tokenizer, pairs = kept(kind, template)
    outcome = pairs.encode(pair_of(prompt, chosen, rejected))
    if isinstance(outcome, Rejection):
        assert outcome.reason in ("identical_answers", "empty_prompt")
        return
    turn = {"role": "user", "content": prompt}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True) if template else prompt
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids_of(outcome)
    assert ids[0][len(ids[0]) - len(bare) :] == bare
    for answer, found in zip((chosen, rejected), ids[1:], strict=True):
        whole = text + answer + tokenizer.eos_token
        if template:
            turns = [turn, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
        joint = tokenizer(whole, add_special_tokens=False)["input_ids"]
        if joint[: len(bare)] == bare:
            behind = joint[len(bare) :]
            assert found == behind[: len(behind) - behind[::-1].index(tokenizer.eos_token_id)]


def test_white_space_inside_a_prompts_last_token_is_not_read_again() -> None:
    """A byte-level post-processor trims it off the token's offsets, as if the space were no part of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: place for place, sign in enumerate([*signs, ":Ġ", "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids = ids_of(encode(encoder(tokenizer, template="plain"), "a: ", "b", "c"))
    assert [tokenizer.convert_ids_to_tokens(part) for part in ids[:2]] == [["Ġ", "a", ":Ġ"], ["b", "</s>"]]


def test_tokenizer_written_in_python_is_read_through_itself() -> None:
    """ByT5: byte + 3 is the id; white space behind an added token is swallowed."""
    from transformers import ByT5Tokenizer

    ids = ids_of(encode(encoder(ByT5Tokenizer(), template="plain"), "hi</s>", "\nok", "no"))
    assert ids == [[107, 108, 1], [114, 110, 1], [113, 114, 1]]


def test_tokenizer_that_reads_a_going_on_text_in_no_known_way_is_an_error() -> None:
    """WordPiece cuts a word that goes on into other pieces: "##so" behind "so" is not the "so" of a text by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["[UNK]", "</s>", "Yes", ",", "##,", "no", "##no", "</s>1"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ModelError, match="goes on from its prompt"):
        encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), template="plain")


# -- BOS


@pytest.mark.parametrize(
    ("kind", "opening"),
    [("llama3", ["<s>"]), ("first", ["<s>"]), ("chatml", []), ("gpt2", []), ("eos_always", []), ("t5", [])],
)
def test_plain_prompt_gets_the_bos_that_its_tokenizer_asks_for(kind: str, opening: list[str]) -> None:
    """One or none; answers have none; the EOS that a tokenizer writes behind every text is no part of a prompt."""
    tokenizer = make(kind, None)
    prompt, chosen, _ = ids_of(encode(encoder(tokenizer, template="plain"), "Tell me", " kind", "rude"))
    text = tokenizer("Tell me", add_special_tokens=False)["input_ids"]
    assert prompt == tokenizer.convert_tokens_to_ids(opening) + text
    assert chosen == [*tokenizer(" kind", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_bos_that_a_plain_prompt_writes_itself_is_not_doubled() -> None:
    """Data that was made ready for another program often has it."""
    tokenizer = make("llama3", None)
    plain = encoder(tokenizer, template="plain")
    assert ids_of(encode(plain, "<s>Tell me", "a", "b")) == ids_of(encode(plain, "Tell me", "a", "b"))


@pytest.mark.parametrize("kind", ["llama3", "llama2", "first", "always"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_prompt_has_the_one_bos_of_its_template(kind: str, template: str) -> None:
    """The tokenizer's would be a second one."""
    tokenizer = make(kind, template)
    prompt, chosen, _ = ids_of(encode(encoder(tokenizer), "Tell me", "kind", "rude"))
    assert prompt[0] == tokenizer.bos_token_id
    assert (prompt + chosen).count(tokenizer.bos_token_id) == 1


def test_bos_that_a_template_writes_twice_is_written_once() -> None:
    """Say, in the template and again around the system turn."""
    tokenizer = make("llama3", "{{ bos_token }}" + TEMPLATES["token"])
    assert ids_of(encode(encoder(tokenizer), "Tell me", "a", "b")) == ids_of(
        encode(encoder(make("llama3", "token")), "Tell me", "a", "b")
    )


# -- EOS


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_end_of_turn_written_inside_an_answer_is_a_rejection(template: str) -> None:
    """No cut is right: a second EOS, or text that is lost."""
    outcome = encoder(template=template).encode(pair_of("hi", f"kind{EOS}rude", "cold"))
    assert outcome == Rejection("end_token_in_answer", f"chosen spells {EOS}")
    call = Message("assistant", "", json.dumps({"tool_calls": [{"function": {"name": f"a{EOS}"}}]}))
    assert encoder().encode(pair_of("hi", "kind", call)) == Rejection("end_token_in_answer", f"rejected spells {EOS}")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_end_of_turn_written_behind_an_answer_is_its_one_end(template: str) -> None:
    """Data that was made ready for another program: the same ids as without."""
    tokenizer = encoder(template=template)
    ids = ids_of(encode(tokenizer, "hi", "kind", "rude"))
    assert ids_of(encode(tokenizer, "hi", f"kind{EOS}", f"rude{EOS}\n")) == ids
    assert tokenizer.encode(pair_of("hi", EOS, "cold")) == Rejection("empty_answer", "chosen")


def test_what_a_template_writes_behind_the_end_of_the_turn_is_dropped() -> None:
    """A newline, a closing remark: generation stops before them."""
    tokenizer = make("llama3", TEMPLATES["newline"] + "{% if not add_generation_prompt %}the end{% endif %}")
    assert tokenizer.decode(ids_of(encode(encoder(tokenizer), "hi", "kind", "rude"))[1]) == "kind</s>"


def test_template_that_writes_no_end_still_ends_the_answer() -> None:
    """EOS is added where the template has none: without it the policy never learns to stop."""
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=bare + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert tokenizer.decode(ids_of(encode(encoder(tokenizer), "hi", "kind", "rude"))[1]) == f"kind\n{EOS}"


def test_template_that_ends_turns_with_a_token_of_its_own_keeps_it_as_the_end() -> None:
    """Gemma's <end_of_turn>, which is not its <eos>: generation stops there. An answer that spells it is refused."""
    template = TEMPLATES["newline"].replace("eos_token", "'<|user|>'")
    tokenizer = encoder(make("llama3", template))
    assert make("llama3").decode(ids_of(encode(tokenizer, "hi", "kind", "rude"))[1]) == "kind<|user|>"
    outcome = tokenizer.encode(pair_of("hi", "ki<|user|>nd", "rude"))
    assert outcome == Rejection("end_token_in_answer", "chosen spells <|user|>")


# -- cuts


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@given(limit=st.integers(1, 12), chosen=ANSWER, rejected=ANSWER)
def test_long_answer_is_cut_and_has_eos_only_where_its_end_is_kept(
    mode: str, limit: int, chosen: str, rejected: str
) -> None:
    """An answer cut at its end is the beginning of the whole one: it did not end there, so it has no EOS."""
    if chosen == rejected:
        return
    whole = encode(encoder(), "hi", chosen, rejected).tokens
    outcome = encoder(max_answer_tokens=limit, answer_truncation=mode).encode(pair_of("hi", chosen, rejected))
    kept = slice(limit) if mode == "keep_start" else slice(-limit, None)
    wanted = [whole.chosen_ids[kept].tolist(), whole.rejected_ids[kept].tolist()]
    if wanted[0] == wanted[1]:
        assert outcome == Rejection("identical_after_truncation", f"the same {limit} tokens")
        return
    assert isinstance(outcome, EncodedPair)
    assert ids_of(outcome)[1:] == wanted
    cut = [len(ids) > limit for ids in (whole.chosen_ids, whole.rejected_ids)]
    assert outcome[1:] == (False, *cut)
    for ids, was_cut in zip(wanted, cut, strict=True):
        assert (ids[-1] == TOKENIZER.eos_token_id) == (mode == "keep_end" or not was_cut)


def test_long_answer_is_dropped_with_its_numbers() -> None:
    """With drop: "kind" and EOS are 2 tokens, and one more is too many."""
    tokenizer = encoder(max_answer_tokens=2, answer_truncation="drop")
    assert isinstance(tokenizer.encode(pair_of("hi", "kind", "rude")), EncodedPair)
    outcome = tokenizer.encode(pair_of("hi", "kind", "it is rude"))
    assert outcome == Rejection("answer_too_long", "rejected: 4 tokens, at most 2")


def test_prompt_at_the_limit_is_used_and_one_token_more_is_rejected() -> None:
    """A cut prompt would be another question, so by default it is dropped."""
    length = len(encode(encoder(), "tell me", "kind", "rude").tokens.prompt_ids)
    assert encode(encoder(max_prompt_tokens=length), "tell me", "kind", "rude")[1:] == (False, False, False)
    outcome = encoder(max_prompt_tokens=length - 1).encode(pair_of("tell me", "kind", "rude"))
    assert outcome == Rejection("prompt_too_long", f"{length} tokens, at most {length - 1}")


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("kind", ["llama3", "gpt2", "chatml"])
def test_prompt_cut_at_its_start_keeps_one_bos_and_its_latest_tokens(kind: str, template: str) -> None:
    """BOS first if there was one, then the end of the prompt: limit 6 leaves 5 of the latest tokens, or 6."""
    tokenizer = make(kind, "newline")
    texts = ("Tell me about the cat and the dog", "kind", "rude")
    whole = ids_of(encode(encoder(tokenizer, template=template), *texts))[0]
    outcome = encode(encoder(tokenizer, template=template, max_prompt_tokens=6, prompt_truncation="keep_end"), *texts)
    has_bos = whole[0] == tokenizer.bos_token_id
    assert has_bos == (kind == "llama3" or (kind == "gpt2" and template == "chat"))
    assert ids_of(outcome)[0] == (whole[:1] + whole[-5:] if has_bos else whole[-6:])
    assert outcome[1:] == (True, False, False)


def test_prompt_cut_right_before_a_bos_does_not_get_a_second_one() -> None:
    """SmolLM2's <|im_start|> is its BOS and begins every turn: the header "<|im_start|>assistant\\n" is 3 tokens."""
    keep = {"max_prompt_tokens": 4, "prompt_truncation": "keep_end"}
    assert TOKENIZER.decode(ids_of(encode(encoder(**keep), "tell me", "a", "b"))[0]) == f"{BOS}assistant\n"


def test_prompt_cut_at_its_end_keeps_the_end_of_its_turn_and_the_answers_header() -> None:
    """Without them the policy would answer in the user's turn. What is cut is the end of the text before."""
    whole = encode(encoder(), "tell me about the cat", "kind", "rude").tokens.prompt_ids
    closing = TOKENIZER(f"{EOS}\n{BOS}assistant\n", add_special_tokens=False)["input_ids"]
    limit = len(whole) - 2
    tokenizer = encoder(max_prompt_tokens=limit, prompt_truncation="keep_start")
    outcome = encode(tokenizer, "tell me about the cat", "kind", "rude")
    assert TOKENIZER.decode(outcome.tokens.prompt_ids) == f"{BOS}user\ntell me about{EOS}\n{BOS}assistant\n"
    assert outcome.tokens.prompt_ids.tolist() == whole[: limit - len(closing)].tolist() + closing
    assert outcome[1:] == (True, False, False)


def test_plain_prompt_cut_at_its_end_is_its_beginning() -> None:
    """There is no header to keep."""
    whole = encode(encoder(template="plain"), "tell me about the cat", "a", "b").tokens.prompt_ids
    cut = encode(
        encoder(template="plain", max_prompt_tokens=3, prompt_truncation="keep_start"),
        "tell me about the cat",
        "a",
        "b",
    )
    assert cut.tokens.prompt_ids.tolist() == whole[:3].tolist()
    assert cut.truncated_prompt


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_cut_prompt_never_exceeds_the_limit_and_is_flagged(kind: str, template: str | None, mode: str) -> None:
    """For every limit from 1 up: a prompt within it, or a rejection with its numbers; never a prompt of BOS alone."""
    tokenizer = make(kind, template)
    form = "chat" if template else "plain"
    turns = (Message("user", "Tell me"), Message("assistant", "what"), Message("user", "about the cat"))
    whole = ids_of(encode(encoder(tokenizer, template=form), turns, "kind", "rude"))[0]
    for limit in range(1, len(whole) + 1):
        cut = encoder(tokenizer, template=form, max_prompt_tokens=limit, prompt_truncation=mode)
        outcome = cut.encode(pair_of(turns, "kind", "rude"))
        if isinstance(outcome, Rejection):
            assert outcome == Rejection("prompt_too_long", f"{len(whole)} tokens, at most {limit}")
            continue
        ids = ids_of(outcome)[0]
        assert len(ids) <= limit
        assert set(ids) != {tokenizer.bos_token_id}
        assert outcome.truncated_prompt == (limit < len(whole))
        bos = tokenizer.bos_token_id
        assert (ids[0] == bos) == (whole[0] == bos)
        assert ids[:2] != [bos, bos]


# -- templates


def test_tools_calls_and_names_reach_the_template_as_the_data_has_them() -> None:
    """Keys of the turn; arguments stay text or object; keys without a value are left out."""
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% if m.name is defined %}({{ m.name }}){% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make("llama3", template)
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    chosen = Message("assistant", "", json.dumps({"tool_calls": [call], "name": None}))
    other = {"function": {"name": "add", "arguments": {"a": 2}}}
    rejected = Message("assistant", "", json.dumps({"tool_calls": [other]}))
    prompt = (Message("user", "add"), Message("tool", "3", json.dumps({"name": "sum"})))
    pair = PreferencePair(prompt, chosen, rejected, "g", tools=json.dumps([{"function": {"name": "add"}}]))
    outcome = encoder(tokenizer).encode(pair)
    assert isinstance(outcome, EncodedPair)
    texts = [tokenizer.decode(ids) for ids in ids_of(outcome)]
    assert texts == [
        "[add]<|user|>add</s><|tool|>(sum)3</s><|assistant|>",
        json.dumps([call]) + "</s>",
        json.dumps([other]) + "</s>",
    ]


def test_tools_in_plain_text_are_a_rejection() -> None:
    """There is no place for them, and leaving them out would lose the answer."""
    call = Message("assistant", "", json.dumps({"tool_calls": [{"function": {"name": "add"}}]}))
    outcome = encoder(template="plain").encode(pair_of("hi", call, "no"))
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, "no place for tools" in outcome.detail) == ("template_refused", True)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_text_is_apply_chat_templates_own(kind: str) -> None:
    """Options, tools, reasoning under its other names and the special tokens all reach the template in the same way."""
    template = (
        "{{ bos_token }}{{ style or 'none' }}{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.reasoning_content or '' }}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make(kind, template)
    prompt = (
        Message("user", "hi"),
        Message("assistant", "a", json.dumps({"thinking": "b"})),
        Message("user", "c<d> é", json.dumps({"x": None})),
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    pair = PreferencePair(prompt, Message("assistant", "a"), Message("assistant", "b"), "g", tools=json.dumps(tools))
    outcome = encoder(tokenizer, template_options={"style": "short"}).encode(pair)
    assert isinstance(outcome, EncodedPair)
    turns = [{"role": m.role, "content": m.content, **json.loads(m.extra or "{}")} for m in prompt]
    expected = tokenizer.apply_chat_template(
        turns, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, style="short"
    )
    assert ids_of(outcome)[0] == expected
    assert "shortb"[:5] in tokenizer.decode(expected)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_text_of_turns_without_extras_is_apply_chat_templates_own(kind: str) -> None:
    """They are rendered without its copying, and are given all that it hands on: options, special tokens, no tools."""
    template = (
        "{{ bos_token }}{{ style }}{{ tools is none }}{{ documents is none }}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}{{ m.thinking is defined }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make(kind, template)
    prompt = (
        Message("system", "s"),
        Message("user", "hi {{ x }} <b>"),
        Message("assistant", "a"),
        Message("user", "é"),
    )
    pair = PreferencePair(prompt, Message("assistant", "yes"), Message("assistant", "no"), "g")
    outcome = encoder(tokenizer, template_options={"style": "short"}).encode(pair)
    assert isinstance(outcome, EncodedPair)
    turns = [{"role": m.role, "content": m.content} for m in prompt]
    found = {
        answer: tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], tokenize=False, style="short"
        )
        for answer in ("yes", "no")
    }
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, style="short")
    assert start.startswith(f"{tokenizer.bos_token or ''}shortTrueTrue")
    texts = [tokenizer.decode(ids) for ids in ids_of(outcome)]
    for text, expected in zip(texts, (start, *(whole.removeprefix(start) for whole in found.values())), strict=True):
        assert text == tokenizer.decode(tokenizer(expected, add_special_tokens=False)["input_ids"])


def test_named_templates_are_chosen_by_whether_there_are_tools() -> None:
    """As apply_chat_template does: "tool_use" with tools, "default" without."""
    templates = {"default": TEMPLATES["token"], "tool_use": "{{ 'TOOLS' if tools }}" + TEMPLATES["token"]}
    tokenizer = make("llama3", None, chat_template=templates)
    pair = pair_of("hi", "a", "b")
    with_tools = PreferencePair(pair.prompt, pair.chosen, pair.rejected, "g", tools='[{"name": "f"}]')
    found = [tokenizer.decode(ids_of(outcome)[0]) for outcome in encoder(tokenizer).encode_many([pair, with_tools])]  # type: ignore[arg-type]
    assert found == ["<s><|user|>hi</s><|assistant|>", "TOOLS<s><|user|>hi</s><|assistant|>"]


@pytest.mark.parametrize(
    ("extra", "tools", "word"),
    [
        ('{"tool_calls": [{"function": {"name": "f"}}]}', "", "tool_calls"),
        ('{"reasoning_content": "hm"}', "", "reasoning_content"),
        ("", '[{"name": "f"}]', "tools"),
    ],
)
def test_what_a_template_does_not_read_is_not_left_out_silently(extra: str, tools: str, word: str) -> None:
    """Tools, tool calls and an answer's thoughts that the template never names: the pair is refused, by the key."""
    chosen = Message("assistant", "kind", extra)
    pair = PreferencePair((Message("user", "hi"),), chosen, Message("assistant", "rude"), "g", tools=tools)
    (outcome,) = encoder(make("llama3", "token")).encode_many([pair])
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, word in outcome.detail) == ("template_refused", True)


def test_answer_of_which_the_template_shows_nothing_is_empty() -> None:
    """Its end alone would be trained as the better answer."""
    pair = PreferencePair(
        (Message("user", "hi"),), Message("assistant", "", '{"name": "x"}'), Message("assistant", "rude"), "g"
    )
    (outcome,) = encoder(make("llama3", "token")).encode_many([pair])
    assert outcome == Rejection("empty_answer", "the chat template shows nothing of chosen")


def test_own_template_is_used_instead_of_the_tokenizers() -> None:
    """Its text decides; the tokenizer's own may be missing."""
    tokenizer = make("llama3", None)
    ids = ids_of(encode(encoder(tokenizer, chat_template=TEMPLATES["text"]), "hi", "kind", "rude"))
    assert [tokenizer.decode(part) for part in ids] == ["<s>[INST] hi [/INST]", " kind </s>", " rude </s>"]


def test_template_that_is_no_jinja_is_an_error_with_its_line() -> None:
    """The user's mistake, found before any record is read."""
    with pytest.raises(ModelError, match=r"your own\) is no Jinja: line 2: .*endfor") as caught:
        encoder(chat_template="{% for m in messages %}\n{% endif %}")
    assert caught.value.exit_code == 2
    with pytest.raises(ModelError, match=r"the tokenizer's\) is no Jinja: line 1: No filter named 'shout'"):
        encoder(tiny_tokenizer(chat_template="{{ messages | shout }}"))


def test_refusal_of_a_template_is_a_rejection_with_its_words() -> None:
    """Many templates raise on a system turn or on roles that do not alternate; others meet what they do not expect."""
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system turn, please') }}")
    assert encoder(tokenizer).encode(pair_of("hi", "a", "b")) == Rejection("template_refused", "no system turn, please")
    tokenizer = tiny_tokenizer(chat_template="{{ messages[5].content.x }}")
    outcome = encoder(tokenizer).encode(pair_of("hi", "a", "b"))
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, "no element 5" in outcome.detail) == ("template_refused", True)


def test_template_that_rewrites_the_prompt_is_a_rejection() -> None:
    """If the prompt changes once an answer follows, no cut between them is right."""
    tokenizer = tiny_tokenizer(chat_template="{{ messages | length }}{{ messages[-1]['content'] }}")
    outcome = encoder(tokenizer).encode(pair_of("hi", "a", "b"))
    assert outcome == Rejection("template_refused", "the chat template changes the prompt once an answer follows")


def test_template_that_does_not_show_the_answers_is_a_rejection_that_says_so() -> None:
    """As templates of image models do with text that is not in a list of parts: not the data's fault."""
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    outcome = encoder(tokenizer).encode(pair_of("hi", "a", "b"))
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, "both answers alike" in outcome.detail) == ("template_refused", True)


def test_empty_thoughts_that_only_the_prompt_has_stay_in_the_prompt() -> None:
    """Generation is given them and then writes the answer; in the whole conversation the template leaves them out."""
    tokenizer = make("llama3", THINKING)
    ids = ids_of(encode(encoder(tokenizer, template_options={"thinking": False}), "hi", "kind", "rude"))
    assert [tokenizer.decode(part) for part in ids] == [
        "<|user|>hi</s><|assistant|><think>\n\n</think>\n\n",
        "kind</s>",
        "rude</s>",
    ]


@pytest.mark.parametrize(
    ("thinking", "thoughts", "words"),
    [
        (True, None, "ends the prompt with '<|assistant|><think>\\\\n', of which '<think>\\\\n' is not there"),
        (False, "because", "empty thoughts, and the answer brings its own"),
    ],
)
def test_thoughts_that_do_not_fit_the_prompt_are_a_rejection(thinking: bool, thoughts: str | None, words: str) -> None:
    """An answer in the middle of opened thoughts, or thoughts behind closed ones: generation never sees either."""
    tokenizer = encoder(make("llama3", THINKING), template_options={"thinking": thinking})
    answer = Message("assistant", "kind", json.dumps({"thoughts": thoughts}))
    outcome = tokenizer.encode(pair_of("hi", answer, "rude"))
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "template_refused"
    assert words.replace("\\\\", "\\") in outcome.detail


def test_thoughts_that_the_prompt_opens_and_the_answer_fills_are_the_answer() -> None:
    """The prompt ends inside the thoughts, where generation begins."""
    tokenizer = make("llama3", THINKING)
    answers = [Message("assistant", text, '{"thoughts": "so"}') for text in ("kind", "rude")]
    ids = ids_of(encode(encoder(tokenizer, template_options={"thinking": True}), "hi", *answers))
    assert [tokenizer.decode(part) for part in ids[:2]] == [
        "<|user|>hi</s><|assistant|><think>\n",
        "so\n</think>\n\nkind</s>",
    ]


def test_option_that_the_template_does_not_read_is_an_error_with_those_it_reads() -> None:
    """A name with a typing error would otherwise change nothing and be believed."""
    template = (
        "{% if date is not defined %}{% set date = strftime_now('%d') %}{% endif %}{% set inner = namespace(a=1) %}"
        "{{ bos_token }}{{ thinking }}{{ date }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    encoder(make("llama3", template), template_options={"thinking": False, "date": "1"})
    for name in ("thinkin", "messages", "strftime_now", "m"):
        with pytest.raises(ConfigError, match=rf"template_options\.{name}: .*Expected: date, thinking\.$"):
            encoder(make("llama3", template), template_options={name: True})
    with pytest.raises(ConfigError, match="this template reads none"):
        encoder(template_options={"thinking": True})


@pytest.mark.parametrize("options", [{"template_options": {"a": 1}}, {"chat_template": "{{ messages }}"}])
def test_plain_text_with_settings_of_a_template_is_an_error(options: dict[str, Any]) -> None:
    """Neither would be read."""
    with pytest.raises(ConfigError, match="plain reads neither"):
        encoder(template="plain", **options)


def test_chat_without_a_template_is_an_error() -> None:
    """A base model: the message says what to set."""
    with pytest.raises(ModelError, match=r"prepare\.template=plain"):
        encoder(tiny_tokenizer(chat_template=None))


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
