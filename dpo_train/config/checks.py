"""What the types of single keys cannot say: keys that contradict each other."""

from __future__ import annotations

import dataclasses
import math

from dpo_train import objective
from dpo_train.config.data import PrepareConfig, SourceConfig
from dpo_train.config.judging import FunctionJudge, RewardModelJudge
from dpo_train.config.run import RunConfig
from dpo_train.config.sweeping import LogUniform, SweepConfig
from dpo_train.config.training import FitConfig, TrainConfig
from dpo_train.errors import ConfigError


def check(config: RunConfig, origin: str) -> None:
    """What the types of single keys cannot say: keys that contradict each other."""
    prepare, train = config.prepare, config.train
    too_few = prepare.max_heldout_pairs is not None and prepare.max_heldout_pairs < config.evaluate.min_heldout_pairs
    wrong = {
        **_fit_mistakes(config, train),
        **(_fit_mistakes(config, config.sft) if config.sft.enabled else {}),
        "prepare.heldout_fraction is 0, so there is nothing to evaluate on": not _may_hold(prepare, "heldout"),
        "prepare.heldout_fraction and prepare.validation_fraction leave nothing to train on": (
            prepare.heldout_fraction + prepare.validation_fraction >= 1
        ),
        "prepare.max_heldout_pairs is below evaluate.min_heldout_pairs": too_few,
        **_sweep_mistakes(config),
        "train.keep=best and train.patience need validation pairs, but prepare.validation_fraction is 0": (
            (train.keep == "best" or train.patience is not None) and not _may_hold(prepare, "validation")
        ),
        "prepare needs prepare.path or prepare.sources, and only one of them": (
            (prepare.path is None) == (not prepare.sources)
        ),
        "prepare.weight has no meaning without other sources": prepare.weight is not None and not prepare.sources,
        "a weight is a share of the training pairs, and a source whose split is not train has none": any(
            source.weight is not None and source.split not in {None, "train"} for source in prepare.sources
        ),
        **{
            f"with prepare.sources, prepare.{name} is set for each source": bool(prepare.sources)
            for name in _source_keys_of(prepare)
        },
        "either every source has a weight or none": (
            len({source.weight is None for source in prepare.sources if source.split in {None, "train"}}) > 1
        ),
        "model.quantization needs whole weights on each worker, so compute.shard=on, compute.score_sharded and "
        "compute.tensor_parallel do not go with it": (
            config.model.quantization is not None
            and (config.compute.shard == "on" or config.compute.score_sharded or config.compute.tensor_parallel > 1)
        ),
        "compute.score_sharded needs several workers (compute.workers, and compute.executor=ray)": (
            config.compute.score_sharded and (config.compute.workers == 1 or config.compute.executor == "local")
        ),
        **_tensor_parallel_mistakes(config),
        "compute.min_workers is above compute.workers": (config.compute.min_workers or 1) > config.compute.workers,
        "compute.min_workers lets a cluster grow and shrink, which Kueue (cluster.queue) does not admit": (
            config.compute.min_workers is not None and config.cluster.queue is not None
        ),
        "compute.min_workers needs Ray, and compute.executor is local": (
            config.compute.min_workers is not None
            and (config.compute.executor == "local" and config.cluster.launcher == "none")
        ),
        "compute.min_workers changes how many work together, and compute.tensor_parallel needs whole groups": (
            config.compute.min_workers is not None and config.compute.tensor_parallel > 1
        ),
        **_evaluation_mistakes(config),
        "prepare.chat_template and prepare.template_options have no meaning with prepare.template=plain": (
            prepare.template == "plain" and (prepare.chat_template is not None or prepare.template_options)
        ),
        **{
            f"prepare.pairing=ranking: {text}": any(s.pairing == "ranking" for s in prepare.all_sources)
            for text in ranking_mistakes(train)
        },
        **{
            f"{where} has an address that is not s3:// or a path: {path}": is_so
            for where, path, is_so in _places(config)
        },
    }
    found = [f"train: {text}" for text in _objective_mistakes(train)] + [text for text, is_so in wrong.items() if is_so]
    if found:
        raise ConfigError(f"{origin} contradicts itself: {'; '.join(found)}")


def _fit_mistakes(config: RunConfig, fit: FitConfig) -> dict[str, bool]:
    """What every training may be told wrongly."""
    name = fit.section
    return {
        f"{name}.weight_decay has no meaning with rmsprop": fit.weight_decay > 0 and fit.optimizer != "adamw",
        f"{name}.frozen names modules of a full training, and {name}.lora trains none of them": (
            bool(fit.frozen) and fit.lora is not None
        ),
        f"model.quantization is of a base under adapters, and without {name}.lora its weights would be trained": (
            config.model.quantization is not None and fit.lora is None
        ),
        f"compute.tensor_parallel is for trainings of all weights, and with {name}.lora adapters are trained": (
            config.compute.tensor_parallel > 1 and fit.lora is not None
        ),
    }


def _tensor_parallel_mistakes(config: RunConfig) -> dict[str, bool]:
    compute = config.compute
    wrong = {
        f"compute.tensor_parallel={compute.tensor_parallel} does not divide compute.workers={compute.workers}": (
            compute.workers % compute.tensor_parallel != 0
        ),
        "compute.tensor_parallel shards weights, and compute.shard is off": compute.shard == "off",
        "compute.tensor_parallel needs several workers, and compute.executor=local is one": compute.executor == "local",
    }
    return wrong if compute.tensor_parallel > 1 else {}


def _evaluation_mistakes(config: RunConfig) -> dict[str, bool]:
    section, gate = config.evaluate, config.evaluate.gate
    by_judge = {name: getattr(gate, name) is not None for name in ("min_win_rate", "min_win_rate_champion")}
    by_samples = {name: getattr(gate, name) is not None for name in ("max_kl", "max_length_growth")}
    return {
        **{
            f"evaluate.gate.{name} needs evaluate.judge": is_set and not section.judge
            for name, is_set in by_judge.items()
        },
        **{
            f"evaluate.gate.{name} needs sampled answers, but evaluate.num_prompts is 0": is_set
            and not section.num_prompts
            for name, is_set in by_samples.items()
        },
        **{
            f"evaluate.gate.{name} compares with a champion, but evaluate.champion is null": (
                getattr(gate, name) is not None and section.champion is None
            )
            for name in ("min_win_rate_champion", "max_set_loss")
        },
        "a prompt of prepare.max_prompt_tokens with an answer of evaluate.max_sample_tokens may be longer than "
        "evaluate.row_tokens": (
            section.num_prompts > 0
            and config.prepare.max_prompt_tokens + section.max_sample_tokens > section.row_tokens
        ),
        "evaluate.judge needs sampled answers, but evaluate.num_prompts is 0": (
            section.judge is not None and not section.num_prompts
        ),
        "evaluate.temperatures is empty, and answers are sampled at some temperature": (
            not section.temperatures and section.num_prompts > 0
        ),
        "evaluate.best_of needs a judge that rewards an answer by itself (kind: function or reward_model)": (
            section.best_of is not None and not isinstance(section.judge, FunctionJudge | RewardModelJudge)
        ),
        "evaluate.best_of needs different answers, and at temperature 0 they are all the same": (
            section.best_of is not None and section.temperatures[:1] == (0.0,)
        ),
    }


def _sweep_mistakes(config: RunConfig) -> dict[str, bool]:
    sweep, train = config.sweep, config.train
    space, losses = sweep.space, sweep.losses or (train.loss,)
    size = math.prod(len(values) for values in space.values() if not isinstance(values, LogUniform))
    every = {
        **_choice_mistakes(config),
        "a sweep over beta chooses how near to stay to the reference, at which no loss of train.loss looks": (
            bool(sweep.betas) and any(objective.is_reference_free(loss) for loss in losses)
        ),
        "a sweep needs validation pairs, but prepare.validation_fraction is 0": not _may_hold(
            config.prepare, "validation"
        ),
        **{f"{key}: low must be below high": r.low >= r.high for key, r in sweep.ranges.items()},
        "sweep.search=grid cannot try every value of a range: set sweep.search=random and sweep.trials": (
            bool(sweep.ranges) and sweep.search == "grid"
        ),
        f"sweep.search={sweep.search} needs sweep.trials, how many combinations to try": (
            sweep.search != "grid" and sweep.trials is None
        ),
        "sweep.trials has no meaning with sweep.search=grid, which tries all combinations": (
            sweep.search == "grid" and sweep.trials is not None and not sweep.ranges
        ),
        f"sweep.trials={sweep.trials} is more than the {size} combinations that there are": (
            not sweep.ranges and sweep.search != "grid" and (sweep.trials or 0) > size
        ),
        "sweep.halving compares trials that start together, and optuna proposes some by what others found": (
            sweep.halving is not None and sweep.search == "optuna"
        ),
        "sweep.lora_ranks needs train.lora": bool(sweep.lora_ranks) and train.lora is None,
        "sweep.lora_ranks cannot change the rank of model.adapter": (
            bool(sweep.lora_ranks) and config.model.adapter is not None
        ),
        "sweep.use=policy takes a trial for the training, but sweep.max_steps makes trials shorter or longer": (
            sweep.use == "policy" and sweep.max_steps is not None and sweep.max_steps != train.max_steps
        ),
        **{
            f"sweep.losses: {loss}: {text}": True
            for loss in sweep.losses
            for text in _objective_mistakes(dataclasses.replace(train, loss=loss), with_options=False)
        },
        **{
            f"sweep.losses: {loss}: prepare.pairing=ranking: {text}": any(
                source.pairing == "ranking" for source in config.prepare.all_sources
            )
            for loss in sweep.losses
            for text in ranking_mistakes(dataclasses.replace(train, loss=loss))
        },
    }
    defaults = SweepConfig()
    # max_steps and use may stay in a config whose betas are taken away for one run.
    names = ("search", "trials", "seeds", "halving")
    unread = [name for name in names if getattr(sweep, name) != getattr(defaults, name)]
    nothing = {
        f"sweep.{', sweep.'.join(unread)} would change a sweep, but it has nothing to try: set sweep.betas, "
        "learning_rates, losses, epochs or lora_ranks": bool(unread)
    }
    return every if space else nothing


def _choice_mistakes(config: RunConfig) -> dict[str, bool]:
    """Of what trials are compared by."""
    sweep = config.sweep
    by_judge = sweep.select.metric in {"reward", "win_rate"}
    by_samples = by_judge or sweep.select.max_kl is not None or sweep.select.max_length_growth is not None
    rewards = isinstance(config.evaluate.judge, FunctionJudge | RewardModelJudge)
    return {
        "sweep.select.metric=reward needs a judge that rewards an answer by itself (evaluate.judge, kind: function or "
        "reward_model)": sweep.select.metric == "reward" and not rewards,
        "sweep.select.metric=win_rate needs evaluate.judge": (
            sweep.select.metric == "win_rate" and config.evaluate.judge is None
        ),
        "sweep.select looks at sampled answers, but sweep.num_prompts is 0": by_samples and not sweep.num_prompts,
        "sweep.kl_points asks for KL along the way, but sweep.num_prompts is 0": (
            sweep.kl_points > 1 and not sweep.num_prompts
        ),
        f"sweep.halve_on={sweep.halve_on} compares trials, and under different losses it means different things: "
        "halve on rewards/accuracy": (
            sweep.halving is not None and len(sweep.losses) > 1 and sweep.halve_on != "rewards/accuracy"
        ),
        "sweep.halve_on=rewards/margin compares trials, and a margin grows with beta: halve on rewards/accuracy": (
            sweep.halving is not None and bool(sweep.betas) and sweep.halve_on == "rewards/margin"
        ),
    }


def ranking_mistakes(train: TrainConfig) -> list[str]:
    """What of a training knows two answers alone, and so cannot be given rankings; each as a sentence."""
    losses = list(objective.weights_of(train.loss))
    wrong = {
        f"train.loss={' + '.join(losses)} sees two answers, plackett_luce alone sees all": losses != ["plackett_luce"],
        "train.ld_alpha compares the lengths of two answers": train.ld_alpha is not None,
        "train.wpo weighs by two answers": train.wpo,
    }
    return [text for text, is_so in wrong.items() if is_so]


def _source_keys_of(prepare: PrepareConfig) -> list[str]:
    """The keys of a source that are set beside ``sources``, where nobody would read them."""
    items = [item for item in dataclasses.fields(SourceConfig) if item.name != "path"]
    return [item.name for item in items if getattr(prepare, item.name) != item.default]


def _may_hold(prepare: PrepareConfig, split: str) -> bool:
    """Whether a split gets pairs: by its fraction, or from a source that all goes there."""
    fraction = {"heldout": prepare.heldout_fraction, "validation": prepare.validation_fraction}[split]
    sources = prepare.all_sources
    return any(source.split == split or (source.split is None and fraction > 0) for source in sources)


def _places(config: RunConfig) -> list[tuple[str, str, bool]]:
    """Every address of the config, and whether it is of a kind that we cannot read or write."""
    places = [
        ("store", config.store, ("s3",)),
        *(("prepare", s.path, ("s3", "hf")) for s in config.prepare.all_sources),
        *(("model.adapter", path, ("s3",)) for path in (config.model.adapter,) if path is not None),
    ]
    return [(where, path, "://" in path and path.split("://")[0] not in kinds) for where, path, kinds in places]


def _objective_mistakes(train: TrainConfig, *, with_options: bool = True) -> list[str]:
    """``with_options=False``: options of one loss alone are for some other trial of a sweep."""
    defaults = {item.name: item.default for item in dataclasses.fields(train)}
    return objective.mistakes(
        train.loss,
        label_smoothing=train.label_smoothing,
        divergence=train.divergence,
        ld_alpha=train.ld_alpha,
        wpo=train.wpo,
        options=[
            name
            for name in (*objective.OPTION_OF, "divergence_alpha")
            if with_options and getattr(train, name) != defaults[name]
        ],
    )
