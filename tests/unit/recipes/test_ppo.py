"""PPO on a tiny model: it maximises the judge's own reward, and its points are complete or not there.

What trains needs a TRL that still has PPO (``dpo_train.recipes.ppo.TRL``), in a folder of PYTHONPATH for instance.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dpo_train.errors import ConfigError, DataError, MissingPackageError, ModelError, RunError, StoreError
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import PROMPTS_SCHEMA
from dpo_train.model.reward_model import RewardModel
from dpo_train.recipes.ppo import JudgedTexts, PpoPoint, _Run, answer_text, train_ppo
from dpo_train.recipes.ppo_config import PpoConfig
from tests.tiny import tiny_model, tiny_policy, tiny_tokenizer
from tests.unit.model.reward_models import tiny_reward_model

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()
LIKED = TOKENIZER.convert_tokens_to_ids("z")
"""In no word that the tokenizer knows, so that it is a token of its own in every text."""

SMALL: dict[str, Any] = {
    "batch": 16,
    "mini_batches": 2,
    "ppo_epochs": 2,
    "max_new_tokens": 6,
    "total_episodes": 48,
    "save_every": 2,
    "learning_rate": 1e-3,
}


def has_ppo() -> bool:
    """Whether this TRL has it. Asked without importing it, which takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        try:
            return importlib.util.find_spec("trl.experimental.ppo") is not None
        except ModuleNotFoundError:
            return False


needs_ppo = pytest.mark.skipif(not has_ppo(), reason="this TRL has no PPO")


def some_prompts(count: int = 40) -> list[list[int]]:
    """Different ones of 2 to 8 tokens, letters and words."""
    drawn = random.Random(3)
    return [[drawn.randrange(40, 300) for _ in range(drawn.randint(2, 8))] for _ in range(count)]


def fond_judge(folder: Path, sign: float = 1.0) -> Path:
    """A judge whose reward grows with the share of LIKED among a text's tokens, or falls for sign -1.

    With e0 in every embedding and e1 in that of LIKED, attention without preferences adds LIKED's share along e1, of
    which the head reads the part that e1 has of the whole.
    """
    from transformers import AutoModelForSequenceClassification

    tiny_reward_model(folder, chat_template=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    layer, width = model.model.layers[0], model.config.hidden_size
    with torch.no_grad():
        for parameter in (*layer.self_attn.parameters(), *layer.mlp.parameters(), *model.score.parameters()):
            parameter.zero_()
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, 0] = 1
        embedding[LIKED, 1] = 1
        # Four heads share two values of eight places: the first value's first place goes to e1.
        layer.self_attn.v_proj.weight[0, 1] = 1
        layer.self_attn.o_proj.weight[1, 0] = 1
        model.score.weight[0, 1] = sign * 4 / width**0.5
    model.save_pretrained(folder)
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one: no two texts have the same reward."""
    return tiny_reward_model(tmp_path_factory.mktemp("judge"), seed=1, chat_template=None)


@pytest.fixture(scope="module")
def trained(
    model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[PpoPoint], list[str]]:
    """Three updates of 16 episodes."""
    if not has_ppo():
        pytest.skip("this TRL has no PPO")
    target, told = tmp_path_factory.mktemp("ppo") / "run", []
    points = train_ppo(
        model, judge, some_prompts(), target, config=PpoConfig(**SMALL), seed=0, device="cpu", tell=told.append
    )
    return target, points, told


def test_points_are_model_folders_whose_weights_move(
    model: Path, trained: tuple[Path, list[PpoPoint], list[str]]
) -> None:
    """Every second update and the last; each loads, ends at the tokenizer's token, and differs from the one before."""
    target, points, told = trained
    assert [(p.step, p.episodes, p.folder) for p in points] == [(2, 32, target / "step-2"), (3, 48, target / "step-3")]
    assert [line.split(":")[0] for line in told] == [f"PPO update {step} of 3" for step in (1, 2, 3)]

    states = [weights(folder) for folder in (model, *(point.folder for point in points))]
    for earlier, later in itertools.pairwise(states):
        assert earlier.keys() == later.keys()
        # AdamW moves a weight by about the learning rate a step, of which an update has four.
        moved = max(float((later[name] - earlier[name]).abs().max()) for name in earlier)
        assert 1e-3 < moved < 2e-2
    policy = tiny_policy(points[-1].folder, lora=False, trainable=False)
    assert policy.model.generation_config.eos_token_id == TOKENIZER.eos_token_id
    assert (points[-1].folder / "tokenizer.json").is_file()


def test_rewards_are_the_judges_for_the_same_texts(
    judge: Path, trained: tuple[Path, list[PpoPoint], list[str]]
) -> None:
    """Of each episode, and the mean that TRL reports of its own scores."""
    target, _, _ = trained
    episodes = lines(target / "episodes.jsonl")
    rewarded = RewardModel(judge, device=CPU, max_tokens=256)(
        [([{"role": "user", "content": each["prompt"]}], each["answer"]) for each in episodes]
    )

    assert [each["reward"] for each in episodes] == pytest.approx(rewarded, abs=1e-5)
    assert len(set(rewarded)) > 40
    reported = [line["reward"] for line in lines(target / "metrics.jsonl")]
    assert reported == pytest.approx([sum(rewarded[i : i + 16]) / 16 for i in (0, 16, 32)], abs=1e-5)


def test_each_prompt_is_used_once_before_any_is_used_twice(trained: tuple[Path, list[PpoPoint], list[str]]) -> None:
    """40 prompts give two batches of 16; the rest of an epoch is left out."""
    target, _, _ = trained
    used = [each["prompt"] for each in lines(target / "episodes.jsonl")]
    assert set(used) <= {TOKENIZER.decode(prompt) for prompt in some_prompts()}
    assert len(set(used[:32])) == 32


def test_kl_begins_at_zero(trained: tuple[Path, list[PpoPoint], list[str]]) -> None:
    """Before the first step policy and reference are one model; only noise of fp32 is between them."""
    first, _, last = (line["kl"] for line in lines(trained[0] / "metrics.jsonl"))
    assert abs(first) < 1e-4
    assert abs(last) > 1e-3


def test_complete_run_is_not_trained_again(
    model: Path, judge: Path, trained: tuple[Path, list[PpoPoint], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even TRL is needed for what is there."""
    target, points, _ = trained
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    told: list[str] = []

    again = train_ppo(
        model, judge, some_prompts(), target, config=PpoConfig(**SMALL), seed=0, device="cpu", tell=told.append
    )

    assert again == points
    assert told == [f"PPO was done before: 2 points in {target}"]


@needs_ppo
def test_incomplete_or_other_run_is_made_anew_and_equal(
    model: Path,
    judge: Path,
    trained: tuple[Path, list[PpoPoint], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another seed's run, then one that was cut off: nothing of either is left, and the same seed gives the same."""
    target, points, _ = trained
    one = PpoConfig(**SMALL | {"total_episodes": 16})
    before = torch.get_rng_state()
    train_ppo(model, judge, some_prompts(), tmp_path, config=one, seed=1, device="cpu")
    (tmp_path / "points.json").unlink()
    (tmp_path / ".step-1").mkdir()

    found = train_ppo(
        model, judge, some_prompts(), tmp_path, config=PpoConfig(**SMALL), seed=0, device="cpu", tell=print
    )

    # What is told is all that comes to standard output.
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"PPO update {step} of 3" for step in (1, 2, 3)
    ]
    assert [point.folder.name for point in found] == ["step-2", "step-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in target.iterdir())
    assert (tmp_path / "episodes.jsonl").read_text() == (target / "episodes.jsonl").read_text()
    assert all(map(torch.equal, weights(found[-1].folder).values(), weights(points[-1].folder).values()))
    assert torch.equal(before, torch.get_rng_state())


def given_to(folder: Path, model: Path) -> Path:
    """The model, saying LIKED about one time in five."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        states = [policy.model(torch.tensor([ids])).last_hidden_state[0] for ids in some_prompts()]
        mean = torch.cat(states).mean(0)
        policy.lm_head.weight[LIKED] = 5 * mean / mean.square().sum()
    policy.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@needs_ppo
@pytest.mark.parametrize("sign", [1, -1])
def test_reward_rises(model: Path, tmp_path: Path, sign: int) -> None:
    """By what the judge likes, which gets commoner, or by what it dislikes, which gets rarer.

    A wrong sign anywhere in between would turn both round.
    """
    config = PpoConfig(batch=32, mini_batches=2, max_new_tokens=8, total_episodes=160, learning_rate=3e-3, kl_coef=0.01)
    given, judge = given_to(tmp_path / "model", model), fond_judge(tmp_path / "judge", sign)

    train_ppo(given, judge, some_prompts(), tmp_path / "run", config=config, seed=0, device="cpu")

    rewards = [line["reward"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    liked = [each["answer"].count("z") for each in lines(tmp_path / "run" / "episodes.jsonl")]
    assert rewards[-1] > rewards[0] + 0.5
    assert sign * (sum(liked[-32:]) - sum(liked[:32])) > 32


@needs_ppo
def test_trl_gets_each_rows_reward(judge: Path) -> None:
    """By its own function, of rows padded on both sides: as RewardModel for the texts. The raw judge's differ."""
    utils = importlib.import_module("trl.experimental.utils")
    from transformers import AutoModelForSequenceClassification

    pad, width = 1000, 4
    prompts = [TOKENIZER("the sea is")["input_ids"][:4], TOKENIZER("it")["input_ids"]]
    answers = [[*TOKENIZER(" warm")["input_ids"], TOKENIZER.eos_token_id], TOKENIZER(" kind and fair")["input_ids"]]
    longest = max(map(len, answers))
    rows = torch.tensor(
        [
            [pad] * (width - len(prompt)) + prompt + answer + [pad] * (longest - len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )
    texts = [
        ([{"role": "user", "content": TOKENIZER.decode(p)}], TOKENIZER.decode(a, skip_special_tokens=True))
        for p, a in zip(prompts, answers, strict=True)
    ]
    rewards = RewardModel(judge, device=CPU, max_tokens=64)
    seen: list[Any] = []

    def reward(*ids: Any) -> list[float]:
        seen.extend(ids)
        return rewards(texts)

    _, scores, _ = utils.get_reward(JudgedTexts(reward, width), rows, pad, width)

    assert seen == [prompts, answers]
    assert scores.tolist() == pytest.approx(rewards(texts), abs=1e-6)
    raw = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    _, theirs, _ = utils.get_reward(raw, rows, pad, width)
    assert not torch.allclose(theirs, scores, atol=1e-3)


@pytest.mark.parametrize(("asked", "layers"), [(None, 2), (1, 1), (9, 2)])
def test_value_model_is_the_sft_model_and_expects_nothing_yet(
    model: Path, judge: Path, tmp_path: Path, asked: int | None, layers: int
) -> None:
    """Its first layers, never more than there are: a layer drawn by lot would be worse than none."""
    rewards = RewardModel(judge, device=CPU, max_tokens=64)
    config = PpoConfig(**SMALL, value_layers=asked)

    value = _Run(model, rewards, some_prompts(), tmp_path, config=config, tell=print).value

    assert len(value.model.layers) == layers
    state = weights(model)
    assert all(torch.equal(parameter, state[f"model.{name}"]) for name, parameter in value.model.named_parameters())
    assert not value.score.weight.any()


def test_every_place_of_a_row_has_its_reward() -> None:
    """Prompts and answers reach the judge without padding, whatever ids stand where it was."""
    seen: list[Any] = []

    def reward(*ids: Any) -> list[float]:
        seen.extend(ids)
        return [1.5, -2.0]

    judged = JudgedTexts(reward, 2)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)

    states = judged.reader(input_ids=torch.tensor([[0, 7, 8, 9, 0], [5, 6, 0, 0, 0]]), attention_mask=mask)

    assert seen == [[[7], [5, 6]], [[8, 9], []]]
    assert judged.score(states.hidden_states[-1]).tolist() == [[[1.5]] * 5, [[-2.0]] * 5]


def test_answers_have_the_text_that_evaluation_gives_them(model: Path) -> None:
    """Of answers that ended and of some that were cut short."""
    policy = tiny_policy(model, lora=False, trainable=False)
    with torch.no_grad():  # ends one answer in four or so
        policy.model.lm_head.weight[TOKENIZER.eos_token_id] *= 2.5
    ask = AnswerPrompts(policy, TOKENIZER, max_tokens=6, seed=0, batch=64, continues=True)
    rows = [
        {"pair_id": str(i), "prompt_ids": ids, "temperature": 1.0, "index": 0} for i, ids in enumerate(some_prompts())
    ]
    answers = ask(pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA)).to_pylist()
    known = frozenset(TOKENIZER.get_vocab().values())

    assert [answer_text(TOKENIZER, row["answer_ids"], known) for row in answers] == [row["answer"] for row in answers]
    assert {row["truncated"] for row in answers} == {True, False}


def test_text_of_an_answer_is_without_its_end_and_without_what_is_no_token() -> None:
    """An end token that is no special token goes too, but only at the end."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token_id = LIKED
    cat, unknown = tokenizer(" cat it").input_ids
    known = {LIKED, cat}
    assert answer_text(tokenizer, [LIKED, cat, unknown, LIKED], known) == "z cat"
    assert answer_text(tokenizer, [cat, unknown], known) == " cat"
    assert answer_text(tokenizer, [], known) == ""


def refused(model: Path, judge: Path, target: Path, prompts: list[list[int]] | None = None) -> None:
    given = some_prompts() if prompts is None else prompts
    train_ppo(model, judge, given, target, config=PpoConfig(**SMALL), seed=0, device="cpu")


def test_trl_without_ppo_is_named(model: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which release has it; nothing is written."""
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(MissingPackageError, match=r"later releases have no PPO.*pip install trl==1\.12\.0"):
        refused(model, judge, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_judge_with_two_outputs_is_refused(model: Path, tmp_path: Path) -> None:
    """Which of the two is the reward?"""
    judge = tiny_reward_model(tmp_path / "judge", num_labels=2, chat_template=None)
    with pytest.raises(ModelError, match=r"does not give one reward.*num_labels=2"):
        refused(model, judge, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_that_cannot_fill_a_batch_are_refused(model: Path, judge: Path, tmp_path: Path) -> None:
    """TRL drops what does not fill one, and would wait for ever; an empty prompt has nothing to go on from."""
    with pytest.raises(DataError, match=r"fewer prompts.*15.*batch=16"):
        refused(model, judge, tmp_path, some_prompts(15))
    with pytest.raises(DataError, match="no token"):
        refused(model, judge, tmp_path, [*some_prompts(), []])


@needs_ppo
def test_folder_of_something_else_is_left_alone(model: Path, judge: Path, tmp_path: Path) -> None:
    """Only what PPO made is ever emptied."""
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(StoreError, match="not a PPO run of ours"):
        refused(model, judge, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


@needs_ppo
def test_judge_without_a_number_stops_the_run(model: Path, tmp_path: Path) -> None:
    """NaN would go into every weight."""
    from transformers import AutoModelForSequenceClassification

    folder = tiny_reward_model(tmp_path / "judge", chat_template=None)
    broken = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(broken.score.weight, float("nan"))
    broken.save_pretrained(folder)
    with pytest.raises(RunError, match="The judge gives nan"):
        refused(model, folder, tmp_path / "run")
    assert not (tmp_path / "run" / "points.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 60, "mini_batches": 8}, r"not divisible.*batch=60, mini_batches=8"),
        ({"batch": 16, "mini_batches": 4}, r"too small for whitened rewards.*4 episodes.*at least 8"),
        ({"learning_rate": 0.0}, r"learning_rate is out of range.*0\.0"),
        ({"kl_coef": -0.1}, r"kl_coef is out of range"),
        ({"kl_coef": float("nan")}, r"kl_coef is out of range"),
        ({"total_episodes": 0}, r"total_episodes is out of range"),
        ({"value_layers": 0}, r"value_layers is out of range"),
    ],
)
def test_config_that_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=message):
        PpoConfig(**change)


def test_updates_are_whole() -> None:
    """65 episodes in batches of 32 are three updates; small minibatches are allowed without whitening."""
    config = PpoConfig(batch=32, mini_batches=8, total_episodes=65, whiten_rewards=False)
    assert config.updates == 3
