"""What chat templates and tokenizers make of a pair, and which of them are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.tokens import EncodedPair, load_tokenizer
from dpo_train.errors import ConfigError, ModelError
from tests.tiny import tiny_tokenizer
from tests.unit.data.encoding import THINKING, TOKENIZER, encode, encoder, ids_of, pair_of
from tests.unit.data.tokenizer_kinds import TEMPLATES, make


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
