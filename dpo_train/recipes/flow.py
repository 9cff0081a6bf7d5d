"""What all recipes share: their config, and steps with progress, reuse and a place in MLflow.

NAME.yaml + overrides --load--> Setting --Flow: stages and steps of one run--> Results (results.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from dpo_train import launch
from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RewardModelJudge, RunConfig, SourceConfig, parse_config, to_dict
from dpo_train.data.folder import MODEL_FOLDER, model_folder
from dpo_train.decoding import apply_override, decode, parse_yaml
from dpo_train.errors import ConfigError
from dpo_train.identity import code_version, library_versions
from dpo_train.model.load import select_device
from dpo_train.recipes.probe import train_probe
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.executor import Executor
from dpo_train.tracking.client import redacted_addresses

MODEL = "smollm2-135m-instruct"
EXAMPLES_FILE = "examples.jsonl"

Sizes = TypeVar("Sizes")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A recipe as it is to run."""

    config: RunConfig
    sizes: Any
    """The section ``recipe``: how much of everything."""
    folder: Path
    """For the store, assets and results."""
    has_own_data: bool
    """Whether the user has named data to take instead of the recipe's."""
    has_own_judge: bool

    @property
    def training(self) -> str:
        """The DPO training in words."""
        section = self.config.train
        what = "all weights" if section.lora is None else f"LoRA of rank {section.lora.rank}"
        name = {"adamw": "AdamW", "rmsprop": "RMSprop"}[section.optimizer]
        return f"{what}, {name} at {section.learning_rate:g}, {section.batch_pairs} pairs a step"

    @property
    def model(self) -> str:
        """The model's name in words."""
        return self.config.model.path.rstrip("/").rpartition("/")[2]

    @property
    def judge(self) -> str:
        """Who rewards, in words."""
        if self.has_own_judge:
            return "a judge of the user's own"
        return (
            f"a linear probe on the untrained model's hidden states after {self.sizes.judge_layers} layers, trained on "
            "texts of its own"
        )


def load(
    name: str, kind: type[Sizes], folder: Path, overrides: Sequence[str], *, scale: float, model: str | None
) -> Setting:
    """The recipe's own config with what the user says otherwise.

    Args:
        kind: dataclass of the section ``recipe``, whose whole numbers are what ``scale`` multiplies.
        folder: where all goes.
        model: a folder or hub name; None: SmolLM2-135M-Instruct from its package.

    Raises:
        ConfigError: a key is unknown, or a value cannot be.
    """
    text = importlib.resources.files("dpo_train.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    tree = parse_yaml(text, f"recipe {name}")
    tree["store"] = str(folder / "store")
    tree["model"] = {"path": model or str(folder / "assets" / MODEL)}
    for override in overrides:
        apply_override(tree, override)
    for key in ("recipe", "prepare", "evaluate"):
        if not isinstance(tree.get(key), dict):
            raise ConfigError(
                f"recipe {name}: {key!r} is a section", got=repr(tree.get(key)), expected=f"{key}.KEY=VALUE"
            )
    section, prepare, evaluate = tree.pop("recipe"), tree["prepare"], tree["evaluate"]
    has_own_data, has_own_judge = "path" in prepare or "sources" in prepare, "judge" in evaluate
    # What is made later; until then it is not there.
    later = str(folder / "the recipe's own")
    if not has_own_data:
        prepare["path"] = later
    if not has_own_judge:
        evaluate["judge"] = {"kind": "reward_model", "path": later}
    sizes = decode({key: _scaled(key, value, scale) for key, value in section.items()}, kind, f"recipe {name}")
    config = parse_config(json.dumps(tree), origin=f"recipe {name}")
    return Setting(config=config, sizes=sizes, folder=folder, has_own_data=has_own_data, has_own_judge=has_own_judge)


def _scaled(key: str, value: Any, scale: float) -> Any:
    """Counts of examples grow and shrink; answers to a prompt, N of best-of-N and points of a curve do not."""
    if key.startswith("num_") and isinstance(value, int) and value:
        return max(2, round(value * scale))
    return value


class Flow:
    """Runs stages and steps one after the other, under one MLflow run."""

    def __init__(self, setting: Setting, run_id: str) -> None:
        self.setting, self.run_id = setting, run_id
        self.executor: Executor = launch.executor(setting.config)
        self.notes: list[str] = []
        """What to know about the results."""

    def stage(self, name: str, config: RunConfig, **inputs: Artifact) -> Artifact:
        """An arrow of the pipeline."""
        return launch.run_stage(name, config, inputs, run_id=self.run_id)

    def tell_fewer(self, made: Artifact) -> None:
        """Notes which counts of an output are smaller than the recipe's sizes of that name: there is no more."""
        for name, number in made.record.counts.items():
            if number < (wanted := getattr(self.setting.sizes, name)):
                self.notes.append(f"recipe.{name} asks for {wanted}, and there are {number}")

    def tell_fewer_prompts(self, prompts: pa.Table, of: str) -> None:
        """The same of held-out prompts, some of which may have made no pair."""
        if len(prompts) < (wanted := self.setting.sizes.num_heldout_prompts):
            self.notes.append(f"recipe.num_heldout_prompts asks for {wanted}, and of {of} there are {len(prompts)}")

    def step(self, name: str, body: Callable[[Executor], Artifact]) -> Artifact:
        """Work of the recipe that makes an output and is no arrow of the pipeline."""
        return launch.run_step(name, self.setting.config, body)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """What the results depend on, and where they were made. ``config``: with the data and the judge that it had."""
        return {
            "config": redacted_addresses(to_dict(config)),
            "recipe": dataclasses.asdict(self.setting.sizes),
            "model": model_digest(config),
            "code": code_version(),
            "versions": library_versions(),
            "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
            "mlflow_run": self.run_id,
        }

    def judge(self, examples: Artifact, config: RunConfig, *, layers: int) -> RewardModelJudge:
        """A probe on the model's hidden states.

        Args:
            examples: an output with ``EXAMPLES_FILE``, from ``write_examples``.
            config: its model is the one that is probed, as it was before any training.
        """
        chat = config.prepare.template == "chat"
        content = {"layers": layers, "seed": config.seed, "chat": chat, "code": code_of("probe")}
        inputs = {"examples": examples.record.digest, "model": model_digest(config)}

        def body(out: Output) -> Summary:
            rows = read_lines(examples.file(EXAMPLES_FILE))
            parts = {
                is_heldout: [
                    (row["prompt"], row["answer"], row["good"]) for row in rows if row["heldout"] is is_heldout
                ]
                for is_heldout in (False, True)
            }
            found = train_probe(
                model_folder(config.model.path),
                parts[False],
                out.path / MODEL_FOLDER,
                heldout=parts[True],
                layers=layers,
                device=select_device(config.compute.device),
                chat=chat,
                seed=config.seed,
            )
            told = f"accuracy {found.accuracy:.3f}, AUC {found.auc:.3f} on {found.n} unseen answers"
            return Summary(details={"summary": told, **dataclasses.asdict(found)})

        made = self.step("judge", lambda _: make(config, "judge", content, inputs, body, output=None))
        return RewardModelJudge(kind="reward_model", path=str(made.path / MODEL_FOLDER))


def write_examples(out: Output, examples: Iterable[tuple[Sequence[Mapping[str, str]], str, bool, bool]]) -> None:
    """What a probe is trained on, and what is kept apart to tell how good it is.

    Args:
        examples: (prompt as messages, answer, whether it is a good one, whether it is kept apart).
    """
    names = ("prompt", "answer", "good", "heldout")
    write_lines(out.path / EXAMPLES_FILE, (dict(zip(names, example, strict=True)) for example in examples))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What ``write_lines`` has written."""
    # A text may hold characters that `splitlines` takes for the end of a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def digest_of(records: Iterable[Any]) -> str:
    """Of records that packages brought: another release of theirs may bring others."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def code_of(*modules: str) -> str:
    """A digest of modules of recipes, which are no part of the code version of stages."""
    files = importlib.resources.files("dpo_train.recipes")
    text = "".join(files.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in modules)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_judge(config: RunConfig, judge: RewardModelJudge) -> RunConfig:
    """The config with this judge."""
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, judge=judge))


def with_sources(config: RunConfig, *sources: SourceConfig) -> RunConfig:
    """The config with other raw data."""
    return dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, path=None, sources=sources))
