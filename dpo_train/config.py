"""Configuration: frozen dataclasses, one per stage, decoded strictly from YAML and ``section.key=value`` overrides.

    YAML text --parse--> dict --override--> dict --decode--> RunConfig      (an error names the key and what to write)

Every field carries its help text, from which ``dpo init`` and docs/config.md are written.
``compute`` and ``tracking`` say where a run happens; they never change what it computes, so they are no part of the
identity of an output (see artifacts.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from dpo_train import objective
from dpo_train.decoding import apply_override, decode, parse_yaml
from dpo_train.errors import ConfigError


def check_alias(alias: str) -> str:
    """An alias that MLflow takes."""
    if not re.fullmatch(r"(?!latest$|v\d+$)[\w-]+", alias):
        raise ValueError("is no alias that MLflow takes: letters, digits, - and _, but not `latest` or `v1`")
    return alias


Seed = Annotated[int, Ge(0), Lt(2**63)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
ModelName = Annotated[str, Field(pattern=r"^[^/:'\"]+$")]
# MLflow keeps "latest" and v1, v2, ... for itself.
Alias = Annotated[str, AfterValidator(check_alias)]

# The names of RULES in objective.py, which a test compares; a type has to spell them out.
Loss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "plackett_luce", "sft", "simpo", "orpo", "unlikelihood",
]  # fmt: skip

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def option(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A dataclass field with a help text; without a default the key is required."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is aligned. Its untrained weights are also the reference."""

    __pydantic_config__ = STRICT

    path: str = option(help="folder in the Hugging Face layout (safetensors), here or at s3://, or a hub name")
    trust_remote_code: bool = option(False, "run Python code that ships with the model; leave off unless you wrote it")


Format = Literal["auto", "pairs", "hh", "ultrafeedback", "ranking", "shp", "tldr", "arena", "helpsteer"]
Truncation = Literal["keep_start", "keep_end", "drop"]
Split = Literal["train", "validation", "heldout"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of raw records: where it lies and how it is read."""

    __pydantic_config__ = STRICT

    path: str = option(
        help="a file, folder or glob (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst), here or at s3://; a "
        "folder that `datasets` saved; or hf://NAME, a data set of the Hugging Face hub"
    )
    format: Format = option("auto", "what the records look like (docs/data.md); auto: recognised by their fields")
    fields: dict[str, str] | None = option(
        None, "your own columns: {prompt: question, chosen: better, rejected: worse}; a dot goes into nested fields"
    )
    pairing: Literal["best_worst", "all", "ranking"] = option(
        "best_worst",
        "of ranked or scored answers: the best against the worst, all pairs of different rank, or the whole ranking "
        "for train.loss=plackett_luce",
    )
    min_strength: Annotated[float, Ge(0)] = option(
        0.0, "reject pairs whose preference is weaker than this (difference of scores, in the data's unit)"
    )
    group_key: str | None = option(None, "field whose value keeps records in one split; default: the prompt")
    split: Split | None = option(None, "put all its pairs into this split; default: by a hash of the group")
    weight: Positive | None = option(
        None, "its share of the training pairs, relative to the other sources; what is too much is left out"
    )
    hub_config: str | None = option(None, "configuration of a hub data set, where it has several")
    hub_split: str = option("train", "split of a hub data set, or of one that `datasets` saved, to read")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(SourceConfig):
    """raw data -> validated, tokenised, split pairs"""

    __pydantic_config__ = STRICT

    path: str | None = option(  # type: ignore[assignment] # one source by itself, or several under `sources`
        None,
        "the raw data: " + SourceConfig.__dataclass_fields__["path"].metadata["help"],
    )
    sources: tuple[SourceConfig, ...] = option(
        (),
        "several sources instead of prepare.path, each with keys of its own: path, format, fields, weight, split, ...",
    )
    validation_fraction: Fraction = option(0.1, "share of the groups kept apart for choosing beta")
    heldout_fraction: Fraction = option(0.1, "share of the groups kept apart for the final evaluation")
    max_train_pairs: Count | None = option(None, "use at most this many training pairs (a seeded choice); default: all")
    max_validation_pairs: Count | None = option(None, "the same for validation")
    max_heldout_pairs: Count | None = option(None, "the same for held-out pairs")
    template: Literal["chat", "plain"] = option(
        "chat", "chat: the tokenizer's chat template; plain: the prompt's text as it is, continued by the answer"
    )
    chat_template: str | None = option(None, "a Jinja file to use instead of the tokenizer's own chat template")
    template_options: dict[str, JsonValue] | None = option(
        None, "variables for the chat template, such as {enable_thinking: false}"
    )
    max_prompt_tokens: Count = option(1024, "longest prompt; prompt_truncation says what happens to a longer one")
    max_answer_tokens: Count = option(512, "longest answer; answer_truncation says what happens to a longer one")
    prompt_truncation: Truncation = option(
        "drop", "of a prompt that is too long: keep its start, its end (the latest turns), or drop the pair"
    )
    answer_truncation: Truncation = option("keep_start", "the same for an answer")
    evaluation_prompts: str | None = option(
        None,
        "file of prompts that no pair may share an n-gram with: .jsonl, .json or .csv with `prompt`, or .txt with a "
        "prompt a line; also .gz",
    )
    evaluation_ngram: Count = option(13, "words in a row that count as overlap with an evaluation prompt")
    report_examples: Annotated[int, Ge(0), Le(50)] = option(3, "examples of each kind in the report")
    redact: bool = option(False, "keep the texts of records out of report and rejections: lengths and reasons only")

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, also where there is only ``path``."""
        if self.path is None:
            return self.sources
        names = [item.name for item in dataclasses.fields(SourceConfig)]
        return (SourceConfig(**{name: getattr(self, name) for name in names}),)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """pairs -> pairs with the reference's per-token log-probs"""

    __pydantic_config__ = STRICT

    row_tokens: Count = option(2048, "tokens per packed row while scoring")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning."""

    __pydantic_config__ = STRICT

    rank: Count = option(16, "rank of the update")
    alpha: Positive = option(32.0, "the update is scaled by alpha / rank")
    target_modules: Annotated[tuple[str, ...], Len(1)] | Literal["all-linear"] = option(
        "all-linear", "names of the modules that get an adapter"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """scored pairs -> policy"""

    __pydantic_config__ = STRICT

    loss: Loss | Annotated[dict[Loss, Positive], Len(1)] = option(
        "sigmoid", "preference loss (docs/losses.md), or several with their weights: {sigmoid: 1.0, sft: 0.1}"
    )
    beta: Positive = option(
        0.1, "strength of the pull towards the reference (ipo: tau; orpo: lambda; simpo: scale); a sweep overrides it"
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = option(
        0.0, "assumed share of wrong labels; with sigmoid it is cDPO, with robust rDPO"
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = option(
        "reverse_kl", "between policy and reference (f-DPO, arXiv 2309.16240)"
    )
    divergence_alpha: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "of the alpha divergence: at 1 the reverse KL, at 0 the forward KL (1 minus the paper's alpha)"
    )
    ld_alpha: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "weight of answer tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411); null: 1"
    )
    wpo: bool = option(False, "weight pairs by how likely the policy is to give them (WPO, arXiv 2406.11827)")
    simpo_margin: Annotated[float, Ge(0)] = option(
        0.5, "simpo's gamma: chosen must lead by gamma / beta nats per token (the paper: beta 2 to 2.5)"
    )
    discopop_tau: Positive = option(0.05, "discopop's temperature")
    unlikelihood_alpha: Annotated[float, Ge(0)] = option(1.0, "unlikelihood's weight of the rejected answer")
    router_aux_loss: Annotated[float, Ge(0)] | None = option(
        None, "weight of a mixture of experts' balancing loss; null: the model's own"
    )
    learning_rate: Positive = option(5e-7, "peak learning rate; about 1e-6 for full fine-tuning, 1e-4 for LoRA")
    optimizer: Literal["adamw", "rmsprop"] = option("adamw", "rmsprop is the DPO paper's")
    weight_decay: Annotated[float, Ge(0)] = option(0.0, "decoupled weight decay (adamw)")
    schedule: Literal["constant", "linear", "cosine"] = option("linear", "after the warm-up")
    warmup_steps: Annotated[int, Ge(0)] = option(10, "steps of linear warm-up")
    max_grad_norm: Positive = option(1.0, "gradients are scaled down to this global norm")
    batch_pairs: Count = option(64, "pairs of one optimiser step, over all workers")
    epochs: Count = option(1, "passes over the training pairs")
    max_steps: Count | None = option(None, "stop after this many steps; default: all epochs")
    row_tokens: Count = option(2048, "tokens per packed row; one row is one micro-batch")
    checkpoint_steps: Count = option(50, "save what a resume needs every so many steps")
    evaluate_steps: Count = option(50, "measure the validation pairs every so many steps, and at the end")
    keep: Literal["last", "best"] = option("last", "which weights the training leaves: its last, or its best measured")
    best_metric: Literal["loss", "rewards/accuracy", "rewards/margin"] = option(
        "loss", "on the validation pairs, for train.keep=best and train.patience"
    )
    patience: Count | None = option(None, "stop after so many measurements without a better one; null: never")
    lora: LoraConfig | None = option(None, "train adapters; null: all weights")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """scored pairs -> the beta to train with, chosen on validation pairs"""

    __pydantic_config__ = STRICT

    betas: tuple[Positive, ...] = option((), "betas to try; empty: no sweep, train.beta is used")
    max_steps: Count | None = option(None, "steps of a trial; default: as long as the training")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Rules that a report must pass before its model is registered."""

    __pydantic_config__ = STRICT

    min_accuracy: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "the lower 95 % bound of held-out accuracy must lie above this"
    )
    min_margin: float = option(0.0, "the held-out mean reward margin must lie above this")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """policy and held-out pairs -> report with a verdict"""

    __pydantic_config__ = STRICT

    num_samples: Annotated[int, Ge(0)] = option(3, "held-out prompts answered by the reference and by the policy")
    max_sample_tokens: Count = option(64, "longest sampled answer")
    min_heldout_pairs: Count = option(100, "refuse to judge on fewer held-out pairs")
    row_tokens: Count = option(2048, "tokens per packed row while scoring")
    gate: GateConfig = field(default_factory=GateConfig, metadata={"help": "rules for the registration"})


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """report and policy -> model version"""

    __pydantic_config__ = STRICT

    model_name: ModelName = option("dpo-policy", "name of the registered model in MLflow")
    alias: Alias = option("challenger", "alias that the new version gets")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how wide stages run. Never part of an output's identity."""

    __pydantic_config__ = STRICT

    executor: Literal["ray", "local"] = option("ray", "ray: Ray Data, Train and Tune; local: in this process, one rank")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: the GPU if there is one")
    workers: Count = option(1, "training workers; with GPUs at most one per GPU")
    data_workers: Count = option(2, "workers for preparing, scoring and sampling")
    shard: Literal["auto", "on", "off"] = option(
        "auto", "FSDP2: each training worker holds a share of every weight; auto: when all weights are trained"
    )
    max_failures: Annotated[int, Ge(0)] = option(1, "how often Ray may restart a training whose worker died")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Object storage behind s3://. Credentials come from the environment or the machine's role, never from here.

    Never part of an output's identity.
    """

    __pydantic_config__ = STRICT

    endpoint: str | None = option(None, "address of an S3 server that is not Amazon's; default: AWS_ENDPOINT_URL")
    region: str | None = option(None, "its region; default: AWS_REGION")
    anonymous: bool = option(False, "read public buckets without credentials")
    attempts: Count = option(6, "how often a request is tried before the run fails, with growing pauses in between")
    cache: str | None = option(None, "folder for local copies; default: DPO_CACHE, else ~/.cache/dpo")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. Never part of an output's identity."""

    __pydantic_config__ = STRICT

    uri: str | None = option(None, "MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the store")
    experiment: str = option("dpo", "MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one pipeline run needs."""

    __pydantic_config__ = STRICT

    store: str = option("dpo-store", "folder, here or at s3://, that holds every output, at <store>/<stage>/<digest>")
    seed: Seed = option(0, "seeds the splits, the order of pairs, the adapters and the samples")
    model: ModelConfig = field(metadata={"help": "the model to align"})
    prepare: PrepareConfig = field(metadata={"help": "raw data to pairs"})
    score: ScoreConfig = field(default_factory=ScoreConfig, metadata={"help": "reference log-probs"})
    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={"help": "choice of beta"})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "the DPO training"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"help": "held-out evaluation"})
    register: RegisterConfig = field(default_factory=RegisterConfig, metadata={"help": "MLflow registration"})
    compute: ComputeConfig = field(default_factory=ComputeConfig, metadata={"help": "where it runs"})
    storage: StorageConfig = field(default_factory=StorageConfig, metadata={"help": "object storage"})
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata={"help": "MLflow tracking"})


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies ``section.key=value`` overrides.

    Relative paths are taken from the current folder and made absolute, because workers run elsewhere.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has a wrong type or value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The config {path} cannot be read: {error}", fix="give the path of a YAML file; `dpo init` writes one"
        ) from None
    return parse_config(text, overrides, origin=str(path))


def parse_config(text: str, overrides: typing.Sequence[str] = (), *, origin: str = "the config") -> RunConfig:
    """The same from YAML (or JSON) text."""
    tree = parse_yaml(text, origin)
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} is not a mapping", got=type(tree).__name__, expected="sections such as `model:`")
    for override in overrides:
        apply_override(tree, override)
    config = decode(tree, RunConfig, origin)
    _check(config, origin)
    return _absolute(config)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def to_text(config: RunConfig) -> str:
    """A config as one line of JSON that ``parse_config`` reads back.

    kfp.local rewrites the text ``python3`` in arguments and takes ``{{$`` for a placeholder; both are written as JSON
    escapes so that no path or name is damaged on the way into a pipeline step.
    """
    text = json.dumps(to_dict(config))
    return text.replace("python3", "\\u0070ython3").replace("{{$", "\\u007b{$")


def _check(config: RunConfig, origin: str) -> None:
    """What the types of single keys cannot say: keys that contradict each other."""
    prepare, train = config.prepare, config.train
    too_few = prepare.max_heldout_pairs is not None and prepare.max_heldout_pairs < config.evaluate.min_heldout_pairs
    wrong = {
        "train.weight_decay has no meaning with rmsprop": train.weight_decay and train.optimizer != "adamw",
        "prepare.heldout_fraction is 0, so there is nothing to evaluate on": not _may_hold(prepare, "heldout"),
        "prepare.heldout_fraction and prepare.validation_fraction leave nothing to train on": (
            prepare.heldout_fraction + prepare.validation_fraction >= 1
        ),
        "prepare.max_heldout_pairs is below evaluate.min_heldout_pairs": too_few,
        "a sweep over beta chooses how near to stay to the reference, at which no loss of train.loss looks": (
            config.sweep.betas and objective.is_reference_free(train.loss)
        ),
        "a sweep needs validation pairs, but prepare.validation_fraction is 0": (
            config.sweep.betas and not _may_hold(prepare, "validation")
        ),
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
    ]
    return [(where, path, "://" in path and path.split("://")[0] not in kinds) for where, path, kinds in places]


def _objective_mistakes(train: TrainConfig) -> list[str]:
    defaults = {item.name: item.default for item in dataclasses.fields(train)}
    return objective.mistakes(
        train.loss,
        label_smoothing=train.label_smoothing,
        divergence=train.divergence,
        ld_alpha=train.ld_alpha,
        wpo=train.wpo,
        options=[name for name in (*objective.OPTION_OF, "divergence_alpha") if getattr(train, name) != defaults[name]],
    )


def _absolute(config: RunConfig) -> RunConfig:
    replace = dataclasses.replace
    model_path = config.model.path
    # A hub name ("org/model") stays as it is unless a folder of that name exists here.
    if model_path.startswith((".", "/", "~")) or Path(model_path).expanduser().exists():
        model_path = _absolute_path(model_path)
    prepare = config.prepare
    prepare = replace(
        prepare,
        path=_absolute_or_none(prepare.path),
        sources=tuple(replace(source, path=_absolute_path(source.path)) for source in prepare.sources),
        chat_template=_absolute_or_none(prepare.chat_template),
        evaluation_prompts=_absolute_or_none(prepare.evaluation_prompts),
    )
    return replace(
        config,
        store=_absolute_path(config.store.rstrip("/") or "/"),
        model=replace(config.model, path=model_path),
        prepare=prepare,
        storage=replace(config.storage, cache=_absolute_or_none(config.storage.cache)),
    )


def _absolute_path(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _absolute_or_none(path: str | None) -> str | None:
    return None if path is None else _absolute_path(path)
