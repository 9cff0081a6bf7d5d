"""Answers are exact samples of the model, whatever is sampled beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import PROMPTS_SCHEMA, divergence
from dpo_train.model.load import Policy, load_policy, merged_model, save_policy
from dpo_train.model.score import score_pairs
from tests.tiny import tiny_model, tiny_policy, tiny_tokenizer
from tests.unit.model.families import FAMILIES, VOCABULARY, write

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """One policy of each family, of 97 tokens."""
    folder = tmp_path_factory.mktemp("families")
    return {
        name: tiny_policy(write(folder / name, build), lora=False, trainable=False) for name, build in FAMILIES.items()
    }


@pytest.fixture
def llama(policies: dict[str, Policy]) -> Policy:
    """Where one family is enough."""
    return policies["llama"]


def prompts(*rows: tuple[str, Sequence[int], float, int]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(PROMPTS_SCHEMA.names, row, strict=True)) for row in rows], schema=PROMPTS_SCHEMA
    )


def varied(temperatures: Sequence[float] = (1.0, 0.0, 0.6)) -> pa.Table:
    """Eight prompts of 1 to 15 tokens, longer than a sliding window of 5, each with one of the temperatures."""
    random = np.random.Generator(np.random.PCG64(5))
    sizes = (3, 1, 15, 6, 9, 2, 12, 4)
    return prompts(
        *(
            (f"p{i}", random.integers(3, VOCABULARY, size=size).tolist(), temperatures[i % len(temperatures)], i // 4)
            for i, size in enumerate(sizes)
        )
    )


def ask(policy: Policy, table: pa.Table, *, batch: int = 8, max_tokens: int = 12, **changes: Any) -> list[list[int]]:
    """The answers' ids, in the table's order."""
    options = {"max_tokens": max_tokens, "seed": 3, "batch": batch, **changes}
    found: list[list[int]] = AnswerPrompts(policy, TOKENIZER, **options)(table)["answer_ids"].to_pylist()
    return found


@torch.no_grad()
def next_probabilities(policy: Policy, ids: Sequence[int]) -> torch.Tensor:
    """Of the token after a plain sequence, fp64 [V]."""
    return torch.softmax(policy.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double(), dim=-1)


def greedy(policy: Policy, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens one after the other, without cache, padding or batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != END):
        ids.append(int(next_probabilities(policy, ids).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_order_and_left_padding_change_no_answer(policies: dict[str, Policy], family: str) -> None:
    """Eight prompts one by one, in eights, and in threes in another order: the same ids, warm and greedy alike."""
    table = varied()
    alone = ask(policies[family], table, batch=1)
    order = [5, 2, 7, 0, 3, 6, 1, 4]

    assert ask(policies[family], table, batch=8) == alone
    assert ask(policies[family], table.take(order), batch=3) == [alone[place] for place in order]
    assert len({tuple(ids) for ids in alone}) >= 6  # they are answers to the prompts, not one for all


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_takes_the_likeliest_token(policies: dict[str, Policy], family: str) -> None:
    """As forwards over the whole sequence say, so that neither cache nor padding is wrong."""
    table = varied((0.0,))

    assert ask(policies[family], table) == [
        greedy(policies[family], prompt, 12) for prompt in table["prompt_ids"].to_pylist()
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_first_tokens_have_the_frequencies_of_the_softmax(llama: Policy, temperature: float) -> None:
    """4,000 samples of one prompt: chi-square of the 97 cells, those of few pooled, within its 99.9 % quantile."""
    from scipy.stats import chi2

    prompt, count = [5, 17, 40], 4000
    table = prompts(*(("p", prompt, temperature, index) for index in range(count)))
    counts = np.bincount([ids[0] for ids in ask(llama, table, batch=1000, max_tokens=1)], minlength=VOCABULARY)
    logits = next_probabilities(llama, prompt).log() / temperature
    expected = count * torch.softmax(logits, dim=-1).numpy()

    few = expected < 5
    cells = np.append(counts[~few], counts[few].sum()), np.append(expected[~few], expected[few].sum())
    statistic = float(((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9)).sum())
    assert len(cells[0]) > 10
    assert statistic < chi2.ppf(0.999, len(cells[0]) - 1)


def test_rare_tokens_come_as_often_as_they_should() -> None:
    """The exponentials behind the choice are fine enough: of 3 million none is 0, and their smallest are as small as
    they have to be."""
    from dpo_train.evaluate.generate import _noise

    draws = _noise(1, CPU)(3_000_000).float()

    assert draws.min() > 0
    for bound in (1e-5, 1e-4, 1e-3):
        expected = 3_000_000 * bound
        assert abs((draws < bound).sum() - expected) < 4 * expected**0.5


def test_randomness_is_of_the_seed_the_pair_the_temperature_and_the_index(llama: Policy) -> None:
    """Any of them changed, the answer is another; none changed, it is the same."""
    base = ("p", [5, 17, 40], 1.0, 0)
    rows = prompts(base, base, ("q", *base[1:]), (*base[:2], 0.9, 0), (*base[:3], 1))
    first, again, *others = ask(llama, rows)
    other_seed = ask(llama, prompts(base), seed=4)[0]

    assert again == first
    assert len({tuple(ids) for ids in (first, *others, other_seed)}) == 5


def test_models_that_are_the_same_say_the_same(policies: dict[str, Policy], tmp_path: Path) -> None:
    """The noise is not the model's: comparisons of a policy with itself are all ties."""
    twin = tiny_policy(write(tmp_path, FAMILIES["llama"]), lora=False, trainable=False)

    assert ask(twin, varied()) == ask(policies["llama"], varied())


def test_generation_settings_of_the_model_do_not_leak_in(tmp_path: Path) -> None:
    """top-k, penalties, forced and suppressed tokens and shortest lengths would all bend the distribution."""
    folder = write(tmp_path, FAMILIES["llama"])
    plain = ask(tiny_policy(folder, lora=False, trainable=False), varied())
    policy = tiny_policy(folder, lora=False, trainable=False)
    policy.model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, min_new_tokens=12, num_beams=4,
        no_repeat_ngram_size=1, suppress_tokens=[plain[0][0]], forced_eos_token_id=7, max_length=16, use_cache=False,
    )  # fmt: skip

    assert ask(policy, varied()) == plain


def test_answer_keeps_its_end_token_in_its_ids_and_not_in_its_text(llama: Policy) -> None:
    """An answer ends at the first end token and is not cut off; one that has none within the limit is."""
    table = varied()
    free = ask(llama, table)
    end = free[0][4]  # any token will do as one that ends

    found = AnswerPrompts(llama, TOKENIZER, max_tokens=12, seed=3, batch=8, end_ids=[end])(table).to_pylist()

    assert found[0]["answer_ids"] == free[0][: free[0].index(end) + 1]
    assert found[0]["truncated"] is False
    for row, ids in zip(found, free, strict=True):
        ended = [place for place, token in enumerate(ids) if token in (end, END)]
        assert row["answer_ids"] == (ids[: ended[0] + 1] if ended else ids)
        assert row["truncated"] is not bool(ended)
        text = row["answer_ids"] if row["truncated"] else row["answer_ids"][:-1]
        assert row["answer"] == TOKENIZER.decode(text, skip_special_tokens=True).strip()
    assert any(row["truncated"] for row in found)


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    """A chat model often has several; each ends an answer."""
    policy = tiny_policy(write(tmp_path, FAMILIES["llama"]), lora=False, trainable=False)
    free = ask(policy, varied((1.0,)))
    ends = [free[0][2], free[1][3]]
    policy.model.generation_config.eos_token_id = ends

    found = ask(policy, varied((1.0,)))

    for ids, whole in zip(found, free, strict=True):
        stops = [place for place, token in enumerate(whole) if token in (*ends, END)]
        assert ids == (whole[: stops[0] + 1] if stops else whole)
    assert len(found[0]) <= 3
    assert len(found[1]) <= 4


def test_tokens_that_the_tokenizer_does_not_know_are_left_out_of_the_text(tmp_path: Path) -> None:
    """The vocabulary matrix is often padded to a round size; an untrained row may be sampled all the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=4 * len(TOKENIZER), **sizes))

    policy = tiny_policy(write(tmp_path, build), lora=False, trainable=False)
    rows = AnswerPrompts(policy, TOKENIZER, max_tokens=20, seed=0, batch=8)(varied((1.0,))).to_pylist()

    known = set(range(len(TOKENIZER)))
    assert sum(not known.issuperset(row["answer_ids"]) for row in rows) >= 7
    for row in rows:
        kept = [token for token in row["answer_ids"] if token in known]
        assert row["answer"] == TOKENIZER.decode(kept, skip_special_tokens=True).strip()


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_an_answer_that_continues_its_prompt_keeps_its_blank(llama: Policy, sentencepiece: bool) -> None:
    """Behind the prompt it is the text of both; a SentencePiece tokenizer drops the first blank of what it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    blank = "\u2581" if sentencepiece else "\u0120"
    words = {"<unk>": 0, "<end>": 1, **{f"{blank}w{number}": number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    table = varied((1.0,))
    rows = AnswerPrompts(llama, tokenizer, max_tokens=6, seed=3, batch=8, continues=True)(table).to_pylist()
    turns = AnswerPrompts(llama, tokenizer, max_tokens=6, seed=3, batch=8)(table).to_pylist()

    for prompt, row, turn in zip(table["prompt_ids"].to_pylist(), rows, turns, strict=True):
        whole = tokenizer.decode([*prompt, *row["answer_ids"]], skip_special_tokens=True)
        assert tokenizer.decode(prompt, skip_special_tokens=True) + row["answer"] == whole
        assert row["answer"].startswith(" w")
        assert (row["answer"].strip(), row["answer_ids"]) == (turn["answer"], turn["answer_ids"])


def test_answers_end_where_the_model_has_no_more_positions(policies: dict[str, Policy]) -> None:
    """GPT-2 with 64: a prompt of 60 leaves five tokens, the last of which needs no position; its neighbour has all."""
    random = np.random.Generator(np.random.PCG64(2))
    rows = [
        ("long", random.integers(3, VOCABULARY, size=60).tolist(), 1.0, 0),
        ("full", random.integers(3, VOCABULARY, size=64).tolist(), 1.0, 0),
        ("short", [5, 6], 1.0, 0),
    ]
    found = AnswerPrompts(policies["gpt2"], TOKENIZER, max_tokens=12, seed=1, batch=8)(prompts(*rows)).to_pylist()

    assert [len(row["answer_ids"]) for row in found] == [5, 1, 12]
    assert [row["truncated"] for row in found] == [True, True, True]
    alone = AnswerPrompts(policies["gpt2"], TOKENIZER, max_tokens=12, seed=1, batch=8)(prompts(rows[2]))
    assert alone["answer_ids"].to_pylist() == [found[2]["answer_ids"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    """A tiny Llama and a trained adapter for it, far from zero."""
    folder = tmp_path_factory.mktemp("lora")
    config = ModelConfig(path=str(tiny_model(folder / "model")))
    policy = load_policy(config, device=CPU, lora=LoraConfig(rank=4, alpha=8.0), trainable=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_policy(policy, folder / "trained", TOKENIZER)
    return config, folder / "trained"


def test_merged_adapters_say_what_adapters_say(trained: tuple[ModelConfig, Path]) -> None:
    """What is registered answers as what was evaluated; and the untrained model answers otherwise."""
    config, weights = trained
    policy = load_policy(config, device=CPU, weights=weights)
    merged = Policy(model=merged_model(config, weights), adapters=None, folder=policy.folder, device=CPU)

    answers = ask(policy, varied())
    assert ask(merged, varied()) == answers
    assert ask(load_policy(config, device=CPU), varied()) != answers


def answer_logps(policy: Policy, table: pa.Table, answers: list[list[int]]) -> np.ndarray:
    pairs = [
        TokenPair(f"{i}", np.array(prompt, np.int32), np.array(ids, np.int32), np.empty(0, np.int32))
        for i, (prompt, ids) in enumerate(zip(table["prompt_ids"].to_pylist(), answers, strict=True))
    ]
    return np.array([scores[0].sum(dtype=np.float64) for scores in score_pairs(policy, pairs, 512)])


@torch.no_grad()
def exact_kl(policy: Policy, reference: Policy, prompt: list[int], ends: Sequence[int]) -> float:
    """Of answers of at most two tokens, by adding up all first tokens; ``ends`` end an answer."""
    first = [next_probabilities(each, prompt) for each in (policy, reference)]
    sequences = torch.tensor([[*prompt, token] for token in range(len(first[0]))])
    second = [
        torch.log_softmax(each.model(sequences, use_cache=False).logits[:, -1].double(), -1)
        for each in (policy, reference)
    ]
    after = (second[0].exp() * (second[0] - second[1])).sum(-1)
    after[list(ends)] = 0
    return float((first[0] * (first[0] / first[1]).log()).sum() + (first[0] * after).sum())


def test_divergence_estimates_the_exact_kl(trained: tuple[ModelConfig, Path]) -> None:
    """4,000 answers of at most two tokens, many of them ended by their first: the exact KL lies within 3 standard
    errors, which are 5 % of it at most; without the end's own log-prob it would not. The model against itself: exactly
    0."""
    config, weights = trained
    policy, reference = load_policy(config, device=CPU, weights=weights), load_policy(config, device=CPU)
    prompt, count = [9, 30, 41, 17], 4000
    ends = next_probabilities(policy, prompt).topk(10).indices.tolist()
    table = prompts(*(("p", prompt, 1.0, index) for index in range(count)))
    answers = ask(policy, table, batch=1000, max_tokens=2, end_ids=ends)
    ids, sizes = [str(i) for i in range(count)], np.array([len(each) for each in answers], float)
    logps, of_reference = (answer_logps(model, table, answers) for model in (policy, reference))

    found = divergence(logps - of_reference, sizes, ids)
    same = divergence(logps - answer_logps(policy, table, answers), sizes, ids)
    is_whole = np.array([each[0] not in ends for each in answers])
    without_ends = divergence((logps - of_reference) * is_whole, sizes, ids)

    assert found is not None
    assert same is not None
    assert without_ends is not None
    wanted = exact_kl(policy, reference, prompt, (*ends, END))
    assert 0.05 < 1 - is_whole.mean() < 0.5
    assert abs(found.kl.value - wanted) < 3 * found.standard_error
    assert found.standard_error < 0.05 * wanted
    assert abs(without_ends.kl.value - wanted) > 3 * without_ends.standard_error
    assert (same.kl.value, same.standard_error) == (0.0, 0.0)
