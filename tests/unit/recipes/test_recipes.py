"""Each recipe from its first step to its figures, with a tiny model and a few examples of the real data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_train.errors import ConfigError
from dpo_train.recipes import catalogue
from dpo_train.recipes.corpora import film_snippets
from dpo_train.recipes.flow import Flow, read_lines
from dpo_train.recipes.results import RESULTS_JSON, RESULTS_MD
from dpo_train.recipes.snippets import judges_snippets, not_the_judges, policys_snippets
from tests.command import dpo, refused
from tests.tiny import tiny_model

COMMON = (
    "recipe.judge_layers=2", "train.learning_rate=0.005", "sft.learning_rate=0.005", "compute.executor=local",
    "evaluate.max_sample_tokens=8", "prepare.max_answer_tokens=8",
)  # fmt: skip
SENTIMENT = (
    *COMMON, "recipe.num_judge_snippets=120", "recipe.num_sft_snippets=64", "recipe.num_prompts=12",
    "recipe.num_heldout_prompts=16", "sweep.betas=[0.1, 5]", "sweep.seeds=1", "recipe.baseline_seeds=1",
    "sweep.kl_points=2",
)  # fmt: skip
WIN_RATES = (
    *COMMON, "recipe.num_judge_pairs=60", "recipe.num_train_pairs=32", "recipe.num_heldout_prompts=12",
    "recipe.best_of=2", "recipe.temperatures=[0.5, 1.0]", "recipe.steps=2", "prepare.max_prompt_tokens=400",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for a whole conversation in a tokenizer that knows few words."""
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def results(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name / RESULTS_JSON).read_text(encoding="utf-8")))


def test_sentiment_gives_reward_against_kl_of_every_method(model: Path, folder: Path) -> None:
    done = dpo("recipe", "sentiment", "--folder", str(folder), "--model", str(model), *SENTIMENT)

    assert done.code == 0, done.output
    found = results(folder, "sentiment")
    methods = {series["name"]: series["points"] for series in found["figures"][0]["series"]}
    assert list(methods) == ["SFT", "DPO", "Preferred-FT", "Unlikelihood", "best-of-N"]
    assert {point["label"].rpartition(",")[0] for point in methods["DPO"]} == {"DPO beta 0.1", "DPO beta 5"}
    assert len(methods["DPO"]) == 4, "two settings, each after two parts of its steps"
    assert methods["SFT"][0]["x"]["value"] == 0
    rewards = [methods["SFT"][0]["y"]["value"], *(point["y"]["value"] for point in methods["best-of-N"])]
    assert rewards == sorted(rewards), "more answers to choose from are no worse"
    assert rewards[-1] > rewards[0]
    assert any(claim["text"].startswith("beta 5 has a smaller KL") for claim in found["claims"])
    page = (folder / "sentiment" / RESULTS_MD).read_text(encoding="utf-8")
    assert "![Expected reward against KL" in page
    assert "## Otherwise than in the paper" in page
    assert (folder / "sentiment" / "frontier.png").stat().st_size > 10_000


def test_sentiment_again_makes_nothing_anew(model: Path, folder: Path) -> None:
    before = results(folder, "sentiment")
    done = dpo("recipe", "sentiment", "--folder", str(folder), "--model", str(model), *SENTIMENT)

    assert done.code == 0, done.output
    files = (folder / "store" / "runs").glob("*/events.jsonl")
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    events = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    ends = [event for event in events if event["kind"] == "end"]
    assert len(ends) >= 10
    assert all(end["reused"] for end in ends)
    after = results(folder, "sentiment")
    assert after["figures"] == before["figures"]
    assert after["claims"] == before["claims"]


@pytest.mark.slow
def test_dialogue_gives_win_rates_over_temperatures_and_steps(model: Path, folder: Path) -> None:
    done = dpo("recipe", "dialogue", "--folder", str(folder), "--model", str(model), *WIN_RATES)

    assert done.code == 0, done.output
    found = results(folder, "dialogue")
    temperatures, steps = found["figures"]
    assert [series["name"] for series in temperatures["series"]] == ["untrained", "Preferred-FT", "DPO", "best of 2"]
    by_name = {series["name"]: [point["y"]["value"] for point in series["points"]] for series in temperatures["series"]}
    assert all(a >= b for a, b in zip(by_name["best of 2"], by_name["Preferred-FT"], strict=True))
    assert [point["x"] for point in steps["series"][0]["points"]] == [0.0, 1.0, 2.0]
    assert steps["series"][1]["points"][0]["y"] == temperatures["series"][1]["points"][1]["y"], "Preferred-FT at 1"
    assert steps["series"][1]["points"][-1]["y"] == temperatures["series"][2]["points"][1]["y"], "DPO at 1"


def test_win_rates_of_other_domains_and_own_data(model: Path, folder: Path, tmp_path: Path) -> None:
    """As summarise has them, with data that a user names: two sources, the second held out only."""
    for number, name in enumerate(("ours", "theirs")):
        lines = [
            {"prompt": f"question {number} {place}: tell me", "chosen": f"it is fair {place}", "rejected": "no"}
            for place in range(160)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sources = [{"path": f"{tmp_path}/ours.jsonl"}, {"path": f"{tmp_path}/theirs.jsonl", "split": "heldout"}]

    done = dpo(
        "recipe", "summarise", "--folder", str(folder), "--model", str(model), *WIN_RATES,
        f"prepare.sources={json.dumps(sources)}",
    )  # fmt: skip

    assert done.code == 0, done.output
    found = results(folder, "summarise")
    assert [figure["name"] for figure in found["figures"]] == ["temperatures", "temperatures-1", "steps"]
    assert found["figures"][1]["title"].endswith("theirs.jsonl")
    assert found["deviations"][0] == "data of the user's own"
    assert any("tiny in place of GPT-J" in text for text in found["deviations"])
    assert any("best of 2" in text for text in found["deviations"])
    assert found["notes"] == []
    assert found["identity"]["config"]["prepare"]["sources"][1]["split"] == "heldout"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sentiment", "recipe.prompts=3"), "unknown key 'prompts'"),
        (("sentiment", "train.betas=3"), "unknown key"),
        (("sentiment", "--scale", "0"), "--scale is out of range"),
        (("poetry",), "invalid choice"),
        (("sentiment", "recipe=3"), "'recipe' is a section"),
        (("sentiment", "prepare.path=x.jsonl"), "makes its own preferences"),
        (("sentiment", "sweep.losses=[ipo]"), "varies nothing else"),
        (
            ("sentiment", "sweep.betas={low: 0.1, high: 1}", "sweep.search=random", "sweep.trials=2"),
            "varies nothing else",
        ),
        (
            ("dialogue", "evaluate.judge={kind: endpoint, url: 'http://x/v1', model: m}"),
            "rewards each answer by itself",
        ),
        (("dialogue", "evaluate.judge={kind: function, function: 'nowhere:f'}"), "nowhere"),
        (("sentiment", "sweep.halving=2"), "which ends some of them before"),
        (("sentiment", "train.keep=best"), "after equally many steps"),
        (("sentiment", "sweep.select.metric=accuracy"), "leave sweep.select.metric=reward"),
        (("sentiment", "recipe.num_ppo_episodes=64", "recipe.num_prompts=4"), "PPO needs more prompts"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(capfd, "recipe", *arguments, "--folder", tmp_path / "new", "--model", model)
    assert not (tmp_path / "new").exists()


def test_more_than_there_is_becomes_what_there_is_and_a_note(model: Path, folder: Path) -> None:
    given = catalogue.setting("sentiment", folder, list(SENTIMENT), scale=1, model=str(model))
    flow = Flow(given, "")
    sizes = replace(given.sizes, num_sft_snippets=10**6, num_prompts=10**6, num_heldout_prompts=3)
    made = policys_snippets(given.config, sizes)
    flow.setting = replace(given, sizes=sizes)
    flow.tell_fewer(made)

    counts = made.record.counts
    assert 1000 < counts["num_prompts"] < counts["num_sft_snippets"] < 10**6
    assert sorted(flow.notes) == [
        f"recipe.{name} asks for 1000000, and there are {counts[name]}" for name in ("num_prompts", "num_sft_snippets")
    ]


def test_parts_of_the_snippets_share_no_film(model: Path, folder: Path) -> None:
    given = catalogue.setting("sentiment", folder, list(SENTIMENT), scale=1, model=str(model))
    sizes = replace(given.sizes, num_sft_snippets=10**6, num_prompts=10**6, num_heldout_prompts=10**6)
    examples = judges_snippets(given.config, 10**6)
    made = policys_snippets(given.config, sizes)
    films = {each.text: each.film for each in film_snippets()}
    judges = {films[row["answer"]] for row in read_lines(examples.file("examples.jsonl"))}
    policys = {films[row["prompt"] + row["chosen"]] for row in read_lines(made.file("sft.jsonl"))}
    asked, unseen = (
        {row["prompt"] for row in read_lines(made.file(name))} for name in ("prompts.jsonl", "heldout.jsonl")
    )

    assert len(judges) > 100
    assert len(policys) > 100
    assert not judges & policys
    assert not asked & unseen
    assert not judges & {each.film for each in not_the_judges(film_snippets(), given.config.seed)}


def test_scale_multiplies_examples_and_nothing_else(model: Path, folder: Path) -> None:
    small = catalogue.setting("dialogue", folder, [], scale=0.5, model=str(model))
    whole = catalogue.setting("dialogue", folder, [], scale=1, model=str(model))

    assert small.sizes.num_train_pairs * 2 == whole.sizes.num_train_pairs
    assert small.sizes.best_of == whole.sizes.best_of
    assert small.config == whole.config
    with pytest.raises(ConfigError, match="scale"):
        catalogue.setting("dialogue", folder, [], scale=-1, model=str(model))
