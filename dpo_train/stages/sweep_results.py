"""What was found of a trial, at an address of its own: another sweep that tries the same thing does not train it again.

A loser's weights are removed, and what was measured of them stays: a few kilobytes and the curve.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Output, Summary, open_artifact, produce
from dpo_train.config import RunConfig
from dpo_train.errors import DpoError, StoreError
from dpo_train.evaluate import judge as judging
from dpo_train.identity import identity
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.stages.measure_trial import asks_judge

STAGE = "trial"
RESULT_FILE = "result.json"


Judge = Mapping[str, Any] | None
"""Identity of a judge; None: none was asked."""


def judge_of(config: RunConfig) -> Judge:
    """The config's judge, whether or not the sweep asks it.

    Raises:
        DpoError: it is not there, and the sweep asks it.
    """
    judge = config.evaluate.judge
    try:
        return None if judge is None else dict(judging.identity(judge))
    except DpoError:
        if asks_judge(config, at_end=True):
            raise
        return None  # it is for the evaluation, and may not be there yet


def result_contents(config: RunConfig, pause_at: int | None, judge: Judge) -> list[dict[str, Any]]:
    """What the sweep's own result depends on besides its training; then that of another which would do as well: that a
    judge was asked changes nothing about accuracy and KL. ``sweep.select`` is not among it: another rule or budget
    finds the same results. ``judge``: see ``judge_of``."""
    content = {
        "pause_at": pause_at,
        "seed": config.seed,
        "num_prompts": config.sweep.num_prompts,
        "max_sample_tokens": config.evaluate.max_sample_tokens if config.sweep.num_prompts else None,
    }
    is_bound = judge is None or asks_judge(config, at_end=pause_at is None)
    return [{**content, "judge": each} for each in ([judge] if is_bound else [None, judge])]


def keep_result(store: str, content: Mapping[str, Any], training: str, result: Mapping[str, Any], curve: Path) -> None:
    """Keeps a result at its address. ``training``: digest that names the training's output."""

    def body(out: Output) -> Summary:
        out.write_json(RESULT_FILE, result)
        if curve.is_file():
            shutil.copyfile(curve, out.path / METRICS_FILE)
        return Summary(counts={"steps": result["step"]})

    inputs = {"training": training}
    produce(STAGE, content, inputs, _home(store, content, training), body)


def find_result(
    store: str, contents: Sequence[Mapping[str, Any]], training: str, curve: Path
) -> Mapping[str, Any] | None:
    """The first of these results that there is, its curve copied to ``curve``; None: nobody has found it out."""
    for content in contents:
        try:
            artifact = open_artifact(_home(store, content, training), STAGE)
        except StoreError:
            continue
        if METRICS_FILE in artifact.record.files:
            curve.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(METRICS_FILE), curve)
        found: dict[str, Any] = json.loads(artifact.file(RESULT_FILE).read_text(encoding="utf-8"))
        return found
    return None


def _home(store: str, content: Mapping[str, Any], training: str) -> str:
    return storage.join(store, STAGE, identity(STAGE, json.loads(json.dumps(content)), {"training": training}))
