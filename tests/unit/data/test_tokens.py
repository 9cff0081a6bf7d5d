"""Pairs to token ids: prompt and answer apart, one BOS, one end of turn, cuts that are told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.data.pairs import Message, Rejection
from dpo_train.data.tokens import EncodedPair
from dpo_train.errors import ModelError
from tests.tiny import BOS, EOS, tiny_tokenizer
from tests.unit.data.encoding import ANSWER, TEXT, TOKENIZER, encode, encoder, ids_of, kept, pair_of
from tests.unit.data.tokenizer_kinds import KINDS, TEMPLATES, make

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
