"""The judge: its folder computes what was fitted, it learns what is there, and it says what it cannot do."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dpo_train.errors import ConfigError, DataError, ModelError, StoreError
from dpo_train.model.reward_model import RewardModel
from dpo_train.recipes.probe import PENALTIES, Example, ProbeQuality, _regression, fit, quality, train_probe
from tests.tiny import BAD, GOOD, TOPICS, tiny_tokenizer

CPU = torch.device("cpu")


def examples(count: int, *, seed: int) -> list[Example]:
    """Two messages and an answer of kind or unkind words, two in three of them kind."""
    random = Random(seed)
    made = []
    for index in range(count):
        words = random.sample(GOOD if index % 3 else BAD, 2)
        topic = random.choice(TOPICS)
        messages = [{"role": "user", "content": f"about the {topic}"}, {"role": "user", "content": f"{index}:"}]
        made.append((messages, f" it is {words[0]} and {words[1]}", bool(index % 3)))
    return made


def family(folder: Path, kind: str) -> Path:
    """A random model of three layers with the tiny tokenizer, which makes the padding of the end token."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **shared))
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                use_sliding_window=True,
                sliding_window=6,
                max_window_layers=1,
                **shared,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_of(example: Example, cue: str) -> str:
    """Plain continuation, as the judge is meant to read it."""
    messages, answer, _ = example
    return "\n\n".join(message["content"] for message in messages) + answer + cue


@pytest.mark.parametrize(("kind", "cue"), [("llama", ""), ("gpt2", "<|im_end|>"), ("qwen3", " so it is")])
def test_folder_gives_the_log_odds_that_were_fitted(kind: str, cue: str, model_folder: Path, tmp_path: Path) -> None:
    """Features of the whole model's layer, of one unpadded text at a time, and ``fit`` give the folder's rewards.

    GPT-2's cue is the model's padding, and is read all the same.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_folder if kind == "llama" else family(tmp_path / "model", kind)
    layers = 1 if kind == "llama" else 2
    train, held = examples(90, seed=0), examples(60, seed=1)

    measured = train_probe(source, train, tmp_path / "judge", heldout=held, layers=layers, device=CPU, seed=3, cue=cue)

    whole, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    norm = whole.transformer.ln_f if kind == "gpt2" else whole.model.norm

    @torch.no_grad()
    def features(example: Example) -> torch.Tensor:
        ids = tokenizer(text_of(example, cue), return_tensors="pt", add_special_tokens=False)["input_ids"]
        state: torch.Tensor = norm(whole(ids, output_hidden_states=True).hidden_states[layers])[0, -1]
        return state.double()

    labels = torch.tensor([float(is_good) for *_, is_good in train], dtype=torch.float64)
    weights = fit(torch.stack([features(example) for example in train]), labels, seed=3)
    expected = torch.stack([features(example) @ weights for example in held])
    rewards = RewardModel(tmp_path / "judge", device=CPU, max_tokens=64)([example[:2] for example in held])
    torch.testing.assert_close(torch.tensor(rewards, dtype=torch.float64), expected, rtol=1e-3, atol=1e-3)
    assert measured == ProbeQuality(
        **asdict(quality(torch.tensor(rewards), torch.tensor([float(example[2]) for example in held])))
    )


def test_judge_learns_what_is_there_and_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    """Kind words are told from unkind ones; labels drawn by lot are not learned."""
    train, held = examples(400, seed=0), examples(200, seed=1)
    coin = Random(2)
    lots = [(messages, answer, coin.random() < 0.5) for messages, answer, _ in [*train, *held]]

    true = train_probe(model_folder, train, tmp_path / "true", heldout=held, layers=2, device=CPU, seed=0)
    control = train_probe(model_folder, lots[:400], tmp_path / "c", heldout=lots[400:], layers=2, device=CPU, seed=0)

    assert true.n == control.n == 200
    assert true.auc > 0.75
    assert true.accuracy > 0.7
    # Four standard errors of an AUC of 100 against 100 without any signal.
    assert abs(control.auc - 0.5) < 0.17


def test_chat_judge_reads_the_models_template_and_the_cue(model_folder: Path, tmp_path: Path) -> None:
    """The folder's template is the model's own and the cue's words, quotes and lines as they are."""
    from transformers import AutoTokenizer

    cue = 'Is "it"\na {{ kind }} word?'
    train = examples(60, seed=0)

    train_probe(
        model_folder, train, tmp_path / "judge", heldout=train, layers=1, device=CPU, seed=0, chat=True, cue=cue
    )

    turns = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "is calm"}]
    own = AutoTokenizer.from_pretrained(model_folder).apply_chat_template(turns, tokenize=False)
    judge = AutoTokenizer.from_pretrained(tmp_path / "judge").apply_chat_template(turns, tokenize=False)
    assert judge == own + cue


def test_regression_is_at_the_minimum_of_its_loss() -> None:
    """The gradient of mean log-loss + penalty / 2 x |standardised weights|^2, by hand, is zero; also far from zero."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(300, 5, generator=random, dtype=torch.float64) * torch.tensor([1, 2, 0.1, 1, 5.0]) + 30
    labels = (features[:, 0] + torch.randn(300, generator=random) > 30.5).double()

    weights = _regression(features, labels, 0.1)

    error = (features @ weights).sigmoid() - labels
    deviation = features.std(dim=0)
    gradient = features.T @ error / 300 + 0.1 * weights * deviation**2
    assert float((gradient / deviation).abs().max() / (1 + (features / deviation).mean(dim=0).norm())) < 1e-5


def test_direction_of_the_mean_acts_as_the_bias() -> None:
    """Four labels in five are 1 and nothing tells which: the log-odds are ln 4 everywhere."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 8, generator=random, dtype=torch.float64) + 40
    labels = (torch.arange(2000) % 5 > 0).double()

    log_odds = features @ fit(features, labels, seed=0)

    assert float(log_odds.mean()) == pytest.approx(math.log(4), abs=0.02)
    assert float(log_odds.std()) < 0.15
    assert sorted(PENALTIES, reverse=True) == list(PENALTIES)


def test_quality_is_worked_by_hand() -> None:
    """Good at 2 and 1, bad at 1 and -1: three of four right; 2 > 1, 2 > -1, 1 = 1 (half), 1 > -1."""
    found = quality(torch.tensor([2.0, 1.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))

    assert found == ProbeQuality(accuracy=0.75, auc=0.875, n=4)


def test_what_cannot_be_made_is_said_and_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    """Too many layers, one kind of answer, no model, no text, a text too long, a folder in the way."""
    good = examples(30, seed=0)
    target = tmp_path / "judge"

    def attempt(model: Path = model_folder, some: list[Example] = good, layers: int = 1, **more: Any) -> None:
        train_probe(model, some, target, heldout=good, layers=layers, device=CPU, seed=0, **more)

    with pytest.raises(ConfigError, match=r"3 layers.*Expected: 1 to 2"):
        attempt(layers=3)
    with pytest.raises(DataError, match="nothing to train on"):
        attempt(some=[example for example in good if example[2]])
    with pytest.raises(ModelError, match="cannot be loaded"):
        attempt(tmp_path / "nothing")
    with pytest.raises(DataError, match="no token"):
        attempt(some=[*good, ([], "", True)])
    with pytest.raises(DataError, match="too long"):
        attempt(some=[*good, ([], "the sea " * 300, True)])
    assert list(tmp_path.iterdir()) == []

    target.mkdir()
    with pytest.raises(StoreError, match="there already"):
        attempt()


def test_a_model_without_a_template_makes_no_chat_judge(tmp_path: Path, model_folder: Path) -> None:
    """Plain it does."""
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    some = examples(30, seed=0)

    with pytest.raises(ConfigError, match="no chat template"):
        train_probe(bare, some, tmp_path / "a", heldout=some, layers=1, device=CPU, seed=0, chat=True)
    train_probe(bare, some, tmp_path / "b", heldout=some, layers=1, device=CPU, seed=0)
    (bare / "chat_template.jinja").write_text("{{ raise_exception('users only') }}")
    with pytest.raises(DataError, match=r"refuses an example: users only.*roles user, user, assistant"):
        train_probe(bare, some, tmp_path / "c", heldout=some, layers=1, device=CPU, seed=0, chat=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "bare"]
