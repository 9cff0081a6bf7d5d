"""Controlled sentiment generation (arXiv 2305.18290, section 6.1): reward against KL, DPO and its baselines.

snippets --split by film--> judge's | policy's
judge's   --probe--> judge, the ground-truth reward
policy's  --sft--> SFT model --four answers a prompt--> answers --judge: all pairs--> preferences
preferences --sweep over beta--> DPO            each after every part of its steps: reward, KL of sampled answers
            --sweep over losses--> Preferred-FT, Unlikelihood
SFT model   --N answers, the best--> best-of-N ; --PPO with the judge--> PPO
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

import numpy as np
import pyarrow as pa
from annotated_types import Ge, Len

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import LogUniform, RewardModelJudge, RunConfig, SourceConfig
from dpo_train.config.kinds import STRICT, Count, Positive, option
from dpo_train.data.folder import model_folder, weights_digest
from dpo_train.data.pairs import Message
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError
from dpo_train.evaluate.trials import Point as TrialPoint
from dpo_train.evaluate.trials import Trial
from dpo_train.evaluate.trials_file import TRIALS_FILE
from dpo_train.evaluate.trials_file import from_dict as trials_from_dict
from dpo_train.findings import Estimate
from dpo_train.progress import Reporter
from dpo_train.recipes.answers import Answers, answers, best_of_kl, heldout_prompts, read
from dpo_train.recipes.contrasts import Dot, Mean, above_at_equal, combined, over_seeds
from dpo_train.recipes.flow import Flow, Setting, code_of, read_lines, with_judge, with_sources
from dpo_train.recipes.ppo import train_ppo
from dpo_train.recipes.ppo_config import PpoConfig
from dpo_train.recipes.ratings import rated
from dpo_train.recipes.results import Claim, Figure, Results, Series
from dpo_train.recipes.snippets import HELDOUT_FILE, PROMPTS_FILE, SFT_FILE, judges_snippets, policys_snippets
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.sample import RANKED_FILE, sample
from dpo_train.stages.sft import with_model_of

TITLE = "Controlled sentiment generation"
SMALLEST_KL = 0.05
"""In nats. The spread between seeds is taken to be no smaller than at this KL."""
FEWEST_EPISODES = 8
"""Of an update of PPO: TRL whitens the rewards of no fewer."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    __pydantic_config__ = STRICT

    num_judge_snippets: Count = option(help="snippets that the judge is trained on")
    num_sft_snippets: Count = option(help="snippets for SFT")
    num_prompts: Count = option(help="prompts that the SFT model answers for the preferences")
    num_heldout_prompts: Count = option(help="prompts that everything is measured on")
    answers: Annotated[int, Ge(2)] = option(help="answers to each prompt")
    judge_layers: Count = option(help="layers of the model below the judge's probe")
    baseline_seeds: Count = option(help="trainings of each baseline; DPO has sweep.seeds")
    best_of: Annotated[tuple[Count, ...], Len(1)] = option(help="N of best-of-N")
    num_ppo_episodes: Annotated[int, Ge(0)] = option(help="answers that PPO learns from; 0: no PPO")
    ppo_points: Count = option(help="after how many equal parts of them it is measured")
    ppo_learning_rate: Positive = option(help="of PPO's policy and value model, all weights of which are trained")
    ppo_kl_coef: Annotated[float, Ge(0)] = option(help="reward that a nat of KL costs in PPO")
    ppo_value_layers: Count = option(help="layers of the SFT model that PPO's value model keeps")


def check(setting: Setting) -> None:
    """What can be known to be wrong before anything is run.

    Raises:
        ConfigError: the data, the judge or the sweep are not this recipe's; or PPO cannot be done so.
    """
    sizes, sweep, judge = setting.sizes, setting.config.sweep, setting.config.evaluate.judge
    if setting.has_own_data:
        raise ConfigError(
            "The recipe sentiment makes its own preferences, and reads no others",
            got="prepare.path or prepare.sources",
            fix="leave them out; `dpo sample` does the same with prompts of your own",
        )
    if set(sweep.space) != {"beta"} or isinstance(sweep.betas, LogUniform):
        raise ConfigError(
            "The recipe sentiment compares betas from a list, and varies nothing else",
            got=", ".join(sweep.space) or "nothing to vary",
            fix="set sweep.betas=[...], and none of sweep.losses, learning_rates, epochs, lora_ranks",
        )
    if sweep.select.metric != "reward":
        raise ConfigError(
            "The recipe sentiment draws rewards against KL, which a sweep asks for where it selects by reward",
            got=f"sweep.select.metric={sweep.select.metric}",
            fix="leave sweep.select.metric=reward",
        )
    if sweep.halving is not None:
        raise ConfigError(
            "The recipe sentiment compares betas at the end of their trainings",
            got=f"sweep.halving={sweep.halving}, which ends some of them before",
            fix="leave sweep.halving out",
        )
    if setting.config.train.keep != "last" or setting.config.train.patience is not None:
        raise ConfigError(
            "The recipe sentiment compares policies after equally many steps",
            got="train.keep or train.patience, which take some of them from before the end",
            fix="leave both out",
        )
    if sizes.num_ppo_episodes and not isinstance(judge, RewardModelJudge):
        raise ConfigError(
            "PPO learns from a reward model, and evaluate.judge is none",
            fix="set evaluate.judge to kind: reward_model, or recipe.num_ppo_episodes=0",
        )
    if sizes.num_ppo_episodes and sizes.num_prompts < FEWEST_EPISODES:
        raise ConfigError(
            "PPO needs more prompts for an update",
            got=f"recipe.num_prompts={sizes.num_prompts}",
            expected=f"at least {FEWEST_EPISODES}",
        )


def run(flow: Flow) -> Results:
    """The whole experiment."""
    setting, sizes = flow.setting, flow.setting.sizes
    base = setting.config
    if not setting.has_own_judge:
        examples = flow.step("examples", lambda _: judges_snippets(setting.config, sizes.num_judge_snippets))
        flow.tell_fewer(examples)
        base = with_judge(base, flow.judge(examples, base, layers=sizes.judge_layers))
        flow.notes.append(rated(flow, base))
    corpus = flow.step("corpus", lambda _: policys_snippets(setting.config, sizes))
    flow.tell_fewer(corpus)
    pairs = flow.stage("prepare", snippets := _of_snippets(base, corpus))
    fine_tuned = flow.stage("sft", snippets, prepare=pairs)
    reference = with_model_of(
        fine_tuned.home, dataclasses.replace(base, sft=dataclasses.replace(base.sft, enabled=False))
    )
    ranked, unseen = (_sampled(flow, reference, corpus, name) for name in (PROMPTS_FILE, HELDOUT_FILE))
    config = _of_preferences(reference, ranked, unseen, sizes)
    preferences = flow.stage("prepare", config)
    scored = flow.stage("score_reference", config, prepare=preferences)
    swept = flow.stage("sweep", config, score_reference=scored)
    supervised = flow.stage("sweep", _supervised(config, sizes), score_reference=scored)
    prompts = heldout_prompts(scored, "validation", sizes.num_heldout_prompts)
    flow.tell_fewer_prompts(prompts, "the snippets")
    inputs = {"scored": scored.record.digest}
    ask_often = functools.partial(answers, config, prompts, inputs=inputs, count=max(sizes.best_of))
    many = flow.step("best-of-N", ask_often)
    methods = {
        "SFT": [_asked_dot(read(many), "SFT")],
        **trial_dots(
            {
                "DPO": (_trials(swept), None),
                "Preferred-FT": (_trials(supervised), "sft"),
                "Unlikelihood": (_trials(supervised), "unlikelihood"),
            },
            flow.notes,
        ),
        "best-of-N": list(_best_of(read(many), sizes.best_of)),
    }
    if sizes.num_ppo_episodes:
        methods["PPO"] = list(_ppo(flow, config, scored, prompts, inputs))
    return _results(flow, config, methods)


def _of_snippets(config: RunConfig, corpus: Artifact) -> RunConfig:
    return with_sources(config, SourceConfig(path=str(corpus.path / SFT_FILE), name="snippets"))


def _sampled(flow: Flow, config: RunConfig, corpus: Artifact, name: str) -> Artifact:
    """The SFT model's answers to prompts, with their rewards."""
    prompts = [(Message("user", record["prompt"]),) for record in read_lines(corpus.file(name))]
    count = flow.setting.sizes.answers
    return flow.step("sample", lambda executor: sample(config, prompts, executor, count=count))


def _of_preferences(config: RunConfig, ranked: Artifact, heldout: Artifact, sizes: Sizes) -> RunConfig:
    source = SourceConfig(path=str(ranked.path / RANKED_FILE), format="ranking", pairing="all", split="train")
    unseen = SourceConfig(path=str(heldout.path / RANKED_FILE), name="heldout", format="ranking", split="validation")
    sweep = dataclasses.replace(config.sweep, num_prompts=sizes.num_heldout_prompts)
    return dataclasses.replace(with_sources(config, source, unseen), sweep=sweep)


def _supervised(config: RunConfig, sizes: Sizes) -> RunConfig:
    """The same trainings with losses that know no beta."""
    sweep = dataclasses.replace(config.sweep, betas=(), losses=("sft", "unlikelihood"), seeds=sizes.baseline_seeds)
    return dataclasses.replace(config, sweep=sweep)


def _trials(sweep: Artifact) -> tuple[Trial, ...]:
    return trials_from_dict(json.loads(sweep.file(TRIALS_FILE).read_text(encoding="utf-8")))[0]


def trial_dots(swept: Mapping[str, tuple[Sequence[Trial], str | None]], notes: list[str]) -> dict[str, list[Dot]]:
    """By method a dot per setting and step, over all seeds.

    A seed moves a policy's KL in proportion to it, and its reward with the root: both start at nothing.

    Args:
        swept: by method its sweep's trials, and its loss where the sweep varies that.
        notes: gets which trainings failed.
    """
    found: dict[tuple[str, str, int], list[TrialPoint]] = {}
    for method, (trials, loss) in swept.items():
        for trial in trials:
            if trial.parameters.get("loss") != loss:
                continue
            beta = trial.parameters.get("beta")
            setting = method if beta is None else f"{method} beta {beta:g}"
            if trial.failure is not None:
                notes.append(f"a training of {setting} is missing where it should have gone on: {trial.failure}")
            for point in trial.points:
                if point.kl is not None and point.reward is not None:
                    found.setdefault((method, setting, point.step), []).append(point)
    settings, points = [setting for _, setting, _ in found], list(found.values())
    kl_groups = [[_mean(one, "kl") for one in each] for each in points]
    scales = [max(SMALLEST_KL, fmean(one.value for one in group)) for group in kl_groups]
    kls = over_seeds(kl_groups, settings, scales)
    reward_groups = [[_mean(one, "reward") for one in each] for each in points]
    rewards = over_seeds(reward_groups, settings, list(map(math.sqrt, scales)))
    dots: dict[str, list[Dot]] = {method: [] for method in swept}
    for (method, setting, step), kl, reward in zip(found, kls, rewards, strict=True):
        dots[method].append(Dot(setting=setting, step=step, x=kl, y=reward))
    return dots


def _mean(point: TrialPoint, metric: str) -> Mean:
    found: Estimate = getattr(point, metric)
    return Mean.measured(found.value, np.array(point.deviations[metric]), found.n)


def _asked_dot(said: Answers, label: str) -> Dot:
    return Dot(setting=label, step=None, x=Mean.of(said.log_ratios()), y=Mean.of(said.rewards()))


def _best_of(many: Answers, numbers: Sequence[int]) -> Iterator[Dot]:
    for number in numbers:
        if number > 1:
            rewards_G = many.rewards(best_of=number)
            kl = Mean.known(best_of_kl(number), len(rewards_G))
            yield Dot(setting=f"best of {number}", step=None, x=kl, y=Mean.of(rewards_G))


def _ppo(
    flow: Flow, config: RunConfig, scored: Artifact, prompts: pa.Table, inputs: Mapping[str, str]
) -> Iterator[Dot]:
    """PPO's policies on the way, asked like all others."""
    sizes, judge = flow.setting.sizes, config.evaluate.judge
    assert isinstance(judge, RewardModelJudge), "checked before"
    batch = min(config.train.batch_pairs * 2, sizes.num_prompts)
    updates = max(1, round(sizes.num_ppo_episodes / batch))
    settings = PpoConfig(
        learning_rate=sizes.ppo_learning_rate,
        kl_coef=sizes.ppo_kl_coef,
        value_layers=sizes.ppo_value_layers,
        batch=batch,
        mini_batches=1,
        total_episodes=updates * batch,
        max_new_tokens=config.evaluate.max_sample_tokens,
        save_every=-(-updates // sizes.ppo_points),
    )
    content = {**dataclasses.asdict(settings), "seed": config.seed, "code": code_of("ppo", "ppo_config")}
    made_of = {**inputs, "model": model_digest(config), "judge": weights_digest(model_folder(judge.path))}
    asked = Split(scored, "train").table(("prompt_ids",))["prompt_ids"].to_pylist()
    reporter = Reporter.from_environment("PPO")

    def body(out: Output) -> Summary:
        points = train_ppo(
            model_folder(config.model.path),
            model_folder(judge.path),
            sorted(set(map(tuple, asked))),
            out.path / "points",
            config=settings,
            seed=config.seed,
            device=config.compute.device,
            tell=reporter.message,
        )
        steps = [[point.episodes, point.folder.name] for point in points]
        return Summary(details={"points": steps, "summary": f"{settings.total_episodes} answers learned from"})

    made = flow.step("PPO", lambda _: make(config, "ppo", content, made_of, body, output=None, resumable=True))
    for episodes, name in made.record.details["points"]:
        folder = str(made.path / "points" / name)
        ask = functools.partial(answers, config, prompts, inputs=inputs, folder=folder)
        said = flow.step("answers: PPO", ask)
        if np.isfinite(read(said).log_ratios()).all():
            yield _asked_dot(read(said), f"PPO, {episodes} episodes")
        else:
            flow.notes.append(f"PPO has diverged after {episodes} episodes: log-probs of its answers are not finite")


def _results(flow: Flow, config: RunConfig, methods: Mapping[str, Sequence[Dot]]) -> Results:
    (start,) = methods["SFT"]
    claims = [
        claim
        for name, dots in methods.items()
        if name not in {"SFT", "DPO"}
        for claim in above_at_equal("DPO", start, methods["DPO"], dots, method=name)
    ]
    claims += _smaller_kl(methods["DPO"])
    gained = [
        Claim(
            text=f"{dot.label}: more reward than SFT",
            found=combined([(1.0, dot.setting, dot.y), (-1.0, start.setting, start.y)]),
        )
        for dot in ends(methods["DPO"])
    ]
    return Results(
        recipe="sentiment",
        title=TITLE,
        figures=(
            Figure(
                name="frontier",
                title="Expected reward against KL, over methods, betas and steps",
                x_label="KL(policy || SFT model), nats per answer",
                y_label="mean reward (log-odds of being positive)",
                series=tuple(
                    Series(name=name, points=tuple(dot.point for dot in dots), is_line=name != "SFT")
                    for name, dots in methods.items()
                ),
            ),
        ),
        claims=(*claims, *gained),
        deviations=_deviations(flow.setting),
        notes=tuple(flow.notes),
        identity=flow.identity(config),
    )


def _deviations(setting: Setting) -> tuple[str, ...]:
    found = [
        f"{setting.model} in place of GPT-2-large, film-review snippets of Rotten Tomatoes (20 words on average) in "
        "place of IMDb reviews",
        f"the ground-truth reward is that of {setting.judge} (log-odds of being positive), in place of a fine-tuned "
        "RoBERTa's probability",
        f"answers of at most {setting.config.evaluate.max_sample_tokens} tokens; KL is that of such answers",
        f"DPO and its baselines: {setting.training}, in place of all weights with RMSprop at 1e-6 and batches of 64",
        f"DPO has {setting.config.sweep.seeds} seeds, each baseline {setting.sizes.baseline_seeds}",
        f"Unlikelihood has weight {setting.config.train.unlikelihood_alpha:g} throughout; the paper tries several",
        "best-of-N's KL is a bound from above, which is to DPO's advantage at equal KL",
    ]
    if setting.sizes.num_ppo_episodes:
        found.append(
            f"PPO has one seed, so that no interval knows how much others would differ, one KL coefficient and one "
            f"learning rate ({setting.sizes.ppo_learning_rate:g}), tuned for nothing, and "
            f"{setting.sizes.num_ppo_episodes} episodes"
        )
    return tuple(found)


def ends(dots: Sequence[Dot]) -> list[Dot]:
    """The last dot of each setting that came to the end."""
    last = max((dot.step or 0 for dot in dots), default=0)
    return [dot for dot in dots if dot.step == last]


def _smaller_kl(dots: Sequence[Dot]) -> Iterator[Claim]:
    """Of neighbouring betas."""
    by_beta = sorted(ends(dots), key=lambda dot: float(dot.setting.split("beta ")[1]))
    for small, large in itertools.pairwise(by_beta):
        names = [dot.setting.removeprefix("DPO ") for dot in (large, small)]
        found = combined([(1.0, small.setting, small.x), (-1.0, large.setting, large.x)])
        yield Claim(text=f"{names[0]} has a smaller KL than {names[1]}", found=found)
