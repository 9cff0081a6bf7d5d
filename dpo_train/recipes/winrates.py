"""Win rates against the data's chosen answers: single-turn dialogue and summarisation (arXiv 2305.18290, section 6.2).

pairs --by groups--> judge's | train | held-out
judge's pairs  --probe--> judge
train  --sft on the chosen--> Preferred-FT, the reference --DPO--> policies along the training
held-out prompts --base, Preferred-FT, best-of-N of it, DPO: over temperatures--> answers --judge--> win rates
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
from annotated_types import Ge, Len

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RunConfig, SourceConfig
from dpo_train.config.kinds import STRICT, Count, Positive, option
from dpo_train.data.shards import Split
from dpo_train.findings import Estimate
from dpo_train.recipes.along import policy_after, steps_of
from dpo_train.recipes.answers import (
    Answers,
    answers,
    gained,
    heldout_prompts,
    outcomes,
    read,
    read_rewards,
    rewards_of_chosen,
    win_rate,
)
from dpo_train.recipes.flow import (
    Flow,
    Setting,
    code_of,
    digest_of,
    with_judge,
    with_sources,
    write_examples,
    write_lines,
)
from dpo_train.recipes.results import Claim, Figure, Point, Results, Series
from dpo_train.stages.common import make
from dpo_train.stages.executor import Executor
from dpo_train.stages.prepare_inputs import set_names
from dpo_train.stages.sft import with_model_of

PAIRS_FILE, OTHERS_FILE = "pairs.jsonl", "others.jsonl"
OTHERS = "another domain"
FEW_PAIRS = 32
"""Of the judge's, measured at the end of trainings."""
ROOM = 1.5
"""So many times the records that are wanted: some cannot be used, and splits are as large as chance makes them. More
would only cost: held-out pairs are scored whether they are asked about or not."""
TOLERATED = 0.1
"""Of the win rate, where sampling gets warmer."""
FEW = 0.05
"""Share of the groups for validation where no judge is trained on them."""
JUDGE_HELDOUT = 0.2
"""Of the judge's pairs, kept apart to tell how good it is."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    __pydantic_config__ = STRICT

    num_judge_pairs: Count = option(help="pairs for the judge")
    num_train_pairs: Count = option(help="pairs for SFT and DPO")
    num_heldout_prompts: Count = option(help="prompts that everything is measured on")
    judge_layers: Count = option(help="layers of the model below the judge's probe")
    best_of: Annotated[int, Ge(2)] = option(help="N of best-of-N")
    temperatures: Annotated[tuple[Positive, ...], Len(1)] = option(help="of the answers")
    steps: Count = option(help="after how many equal parts of the training the policy is asked")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is said of one of the two experiments, and its data."""

    name: str
    title: str
    records: Callable[[int], Iterable[Mapping[str, Any]]]
    """Seed to preference records {prompt, chosen, rejected, group}."""
    others: Callable[[int], Iterable[Mapping[str, Any]]] | None
    """The same of a domain that is not trained on; None: there is none."""
    papers_model: str
    deviations: tuple[str, ...]
    """Of its data."""


def run(flow: Flow, task: Task) -> Results:
    """The whole experiment."""
    setting, sizes, config = flow.setting, flow.setting.sizes, flow.setting.config
    prepare = dataclasses.replace(config.prepare, max_train_pairs=sizes.num_train_pairs)
    if setting.has_own_judge:
        prepare = dataclasses.replace(prepare, validation_fraction=FEW)
    config = dataclasses.replace(config, prepare=prepare)
    if not setting.has_own_data:
        corpus = flow.step("corpus", lambda _: _corpus(setting.config, sizes, task))
        config = with_sources(config, *_sources(corpus))
    if not setting.has_own_judge:
        examples = _examples(flow, config, sizes)
        flow.tell_fewer(examples)
        config = with_judge(config, flow.judge(examples, config, layers=sizes.judge_layers))
    untrained = config.model.path
    pairs = flow.stage("prepare", config := _with_validation(config, FEW_PAIRS))
    if (number := pairs.record.counts["pairs/train"]) < sizes.num_train_pairs:
        flow.notes.append(f"recipe.num_train_pairs asks for {sizes.num_train_pairs}, and there are {number}")
    fine_tuned = flow.stage("sft", config, prepare=pairs)
    scored = flow.stage("score_reference", config, sft=fine_tuned, prepare=pairs)
    off = dataclasses.replace(config.sft, enabled=False)
    config = with_model_of(fine_tuned.home, dataclasses.replace(config, sft=off))
    *way, end = steps_of(config, scored, sizes.steps)
    along = [
        (step, flow.step(f"DPO, {step} steps", functools.partial(policy_after, config, scored, step=step)))
        for step in way
    ]
    policy = flow.stage("train", config, score_reference=scored)
    ask = _Asking(flow=flow, config=config, scored=scored)
    sets = {name: ask.everyone(place, policy, untrained) for place, name in enumerate(set_names(config))}
    first = sets[next(iter(sets))].said
    steps = [
        (0, first["Preferred-FT"]),
        *((step, ask.policy(0, each, f"after {step} steps")) for step, each in along),
        (end, first["DPO"]),
    ]
    return _results(flow, config, task, sets, steps)


def _corpus(config: RunConfig, sizes: Sizes, task: Task) -> Artifact:
    section = config.prepare
    shares = {
        section.validation_fraction: sizes.num_judge_pairs,
        section.heldout_fraction: sizes.num_heldout_prompts,
        1 - section.validation_fraction - section.heldout_fraction: sizes.num_train_pairs,
    }
    most = math.ceil(ROOM * max(number / share for share, number in shares.items() if share))
    records = {PAIRS_FILE: list(task.records(config.seed))[:most]}
    if task.others is not None:
        records[OTHERS_FILE] = list(task.others(config.seed))[: math.ceil(ROOM * sizes.num_heldout_prompts)]

    def body(out: Output) -> Summary:
        for name, lines in records.items():
            write_lines(out.path / name, lines)
        told = " and ".join(f"{len(lines)} of {name}" for name, lines in records.items())
        return Summary(details={"summary": f"preferences: {told}"})

    inputs = {name: digest_of(lines) for name, lines in records.items()}
    return make(config, "corpus", {"task": task.name}, inputs, body, output=None)


def _sources(corpus: Artifact) -> Iterator[SourceConfig]:
    yield SourceConfig(path=str(corpus.path / PAIRS_FILE), name="pairs", group_key="group")
    if (others := corpus.path / OTHERS_FILE).is_file():
        yield SourceConfig(path=str(others), name=OTHERS, group_key="group", split="heldout")


def _with_validation(config: RunConfig, most: int) -> RunConfig:
    return dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, max_validation_pairs=most))


def _examples(flow: Flow, config: RunConfig, sizes: Sizes) -> Artifact:
    """The judge's pairs: the same split of the same data, of which the policy's training takes nothing."""
    pairs = flow.stage("prepare", _with_validation(config, sizes.num_judge_pairs))

    def body(out: Output) -> Summary:
        table = Split(pairs, "validation").table(("group", "prompt", "chosen", "rejected"))
        groups = sorted(set(table["group"].to_pylist()))
        kept = set(groups[: round(len(groups) * JUDGE_HELDOUT)])
        write_examples(
            out,
            (
                (_messages(row["prompt"]), row[side], side == "chosen", row["group"] in kept)
                for row in table.to_pylist()
                for side in ("chosen", "rejected")
            ),
        )
        return Summary(counts={"num_judge_pairs": len(table)}, details={"summary": f"{2 * len(table)} answers"})

    content = {"code": code_of("winrates"), "share": JUDGE_HELDOUT}
    return flow.step(
        "examples",
        lambda _: make(config, "examples", content, {"pairs": pairs.record.digest}, body, output=None),
    )


def _messages(prompt: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def couples(texts: Iterable[tuple[str, Any, str]], seed: int, *, neighbours: bool = False) -> Iterator[dict[str, Any]]:
    """Preferences between texts that were written for something: two by two, in a seeded order, the first one's own
    against the second's. No text is in two couples, and each is as likely the chosen one as the rejected.

    Args:
        texts: (name, what it was written for, the text).
        neighbours: whether the two stand side by side in ``texts``, not anywhere. Where the order is by name they are
            about much the same, so that words in common do not give the better one away.
    """
    found, draw = list(texts), random.Random(seed)
    if not neighbours:
        draw.shuffle(found)
    pairs = list(zip(found[::2], found[1::2], strict=False))
    if neighbours:
        draw.shuffle(pairs)
        pairs = [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs]
    for (first, prompt, chosen), (second, _, rejected) in pairs:
        if chosen != rejected:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "group": f"{first}+{second}"}


@dataclass(frozen=True, kw_only=True)
class _Set:
    """What everybody said to the prompts of one set."""

    chosen: Mapping[str, float | None]
    """The rewards of the data's own answers."""
    said: Mapping[str, Answers]
    """By method."""

    def outcomes(self, method: str, temperature: float, *, best_of: int = 1) -> dict[str, float]:
        """Of a method's answers, or of the best of so many, against the data's own."""
        said = self.said[method]
        return outcomes(said.at(temperature) if best_of == 1 else said.best_of(best_of, temperature), self.chosen)


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """Asks models for answers to the held-out prompts of a set."""

    flow: Flow
    config: RunConfig
    scored: Artifact

    def everyone(self, place: int, policy: Artifact, untrained: str) -> _Set:
        prompts = self._prompts(place)
        self.flow.tell_fewer_prompts(prompts, set_names(self.config)[place])
        ask = functools.partial(rewards_of_chosen, self.config, prompts, inputs=self._inputs)
        return _Set(
            chosen=read_rewards(self.flow.step("answers: chosen", ask)),
            said={
                "untrained": self._ask(place, "untrained", folder=untrained),
                "Preferred-FT": self._ask(place, "Preferred-FT", count=self.flow.setting.sizes.best_of),
                "DPO": self.policy(place, policy, "DPO"),
            },
        )

    def policy(self, place: int, policy: Artifact, title: str) -> Answers:
        return self._ask(place, title, policy=policy)

    @property
    def _inputs(self) -> dict[str, str]:
        return {"scored": self.scored.record.digest}

    def _prompts(self, place: int) -> pa.Table:
        return heldout_prompts(self.scored, "heldout", self.flow.setting.sizes.num_heldout_prompts, dataset=place)

    def _ask(self, place: int, title: str, **more: Any) -> Answers:
        def body(executor: Executor) -> Artifact:
            return answers(
                self.config,
                self._prompts(place),
                executor,
                inputs=self._inputs,
                temperatures=self.flow.setting.sizes.temperatures,
                **more,
            )

        return read(self.flow.step(f"answers: {title}", body))


def _results(
    flow: Flow, config: RunConfig, task: Task, sets: Mapping[str, _Set], steps: list[tuple[int, Answers]]
) -> Results:
    sizes = flow.setting.sizes
    names = list(sets)
    first = sets[names[0]]
    figures = [_over_temperatures(task, name, each, sizes, place) for place, (name, each) in enumerate(sets.items())]
    figures.append(
        Figure(
            name="steps",
            title=f"{task.title}: over the training",
            x_label="optimiser steps of DPO (0: Preferred-FT)",
            y_label="win rate against the chosen answers",
            series=tuple(
                Series(
                    name=f"temperature {temperature:g}",
                    points=tuple(
                        Point(
                            label=f"step {step}",
                            x=float(step),
                            y=win_rate(outcomes(said.at(temperature), first.chosen)),
                        )
                        for step, said in steps
                    ),
                )
                for temperature in sizes.temperatures
            ),
            level=0.5,
        )
    )
    return Results(
        recipe=task.name,
        title=task.title,
        figures=tuple(figures),
        claims=tuple(
            claim
            for figure, each in zip(figures[:-1], sets.values(), strict=True)
            for claim in _claims(figure.title, each, sizes)
        ),
        deviations=_deviations(flow.setting, task),
        notes=tuple(flow.notes),
        numbers={
            f"KL of DPO from Preferred-FT, nats per answer: {name}": each.said["DPO"].kl()
            for name, each in sets.items()
            if 1.0 in sizes.temperatures
        },
        identity=flow.identity(config),
    )


def _deviations(setting: Setting, task: Task) -> tuple[str, ...]:
    return (
        *(("data of the user's own",) if setting.has_own_data else task.deviations),
        f"{setting.model} in place of {task.papers_model}; {setting.training}, in place of all weights with RMSprop at "
        "1e-6",
        f"answers are judged by {setting.judge}, in place of GPT-4",
        f"answers of at most {setting.config.evaluate.max_sample_tokens} tokens; best of {setting.sizes.best_of} in "
        "place of best of 128, chosen by the very judge that judges it afterwards, which the paper's is not",
    )


def _over_temperatures(task: Task, name: str, each: _Set, sizes: Sizes, place: int) -> Figure:
    methods = {
        **{method: (method, 1) for method in each.said},
        f"best of {sizes.best_of}": ("Preferred-FT", sizes.best_of),
    }
    series = [
        Series(
            name=title,
            points=tuple(
                Point(
                    label=f"{title} at {temperature:g}",
                    x=temperature,
                    y=win_rate(each.outcomes(method, temperature, best_of=number)),
                )
                for temperature in sizes.temperatures
            ),
        )
        for title, (method, number) in methods.items()
    ]
    return Figure(
        name="temperatures" if place == 0 else f"temperatures-{place}",
        title=task.title if place == 0 else f"{task.title}: {name}",
        x_label="sampling temperature",
        y_label="win rate against the chosen answers",
        series=tuple(series),
        level=0.5,
    )


def _claims(title: str, each: _Set, sizes: Sizes) -> Iterator[Claim]:
    """All on the same prompts."""
    for opponent, number in (("Preferred-FT", 1), ("Preferred-FT", sizes.best_of)):
        name = opponent if number == 1 else f"best of {number}"
        for temperature in sizes.temperatures:
            theirs = each.outcomes(opponent, temperature, best_of=number)
            text = f"{title}: DPO above {name} at temperature {temperature:g}"
            yield Claim(text=text, found=gained(each.outcomes("DPO", temperature), theirs))
    coldest, hottest = min(sizes.temperatures), max(sizes.temperatures)
    if coldest != hottest:
        lost = gained(each.outcomes("DPO", coldest), each.outcomes("DPO", hottest))
        found = Estimate(value=TOLERATED - lost.value, low=TOLERATED - lost.high, high=TOLERATED - lost.low, n=lost.n)
        text = f"{title}: DPO loses less than {TOLERATED:g} from temperature {coldest:g} to {hottest:g}"
        yield Claim(text=text, found=found)
