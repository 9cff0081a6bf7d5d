"""A training's policies on its way: the paper's figures show them after every so many steps."""

from __future__ import annotations

from dpo_train import storage
from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.config import RunConfig
from dpo_train.data.batches import num_steps
from dpo_train.data.shards import Split
from dpo_train.errors import StoreError
from dpo_train.identity import identity
from dpo_train.progress import Reporter
from dpo_train.stages.executor import Executor
from dpo_train.stages.sweep_paused import paused_policy
from dpo_train.stages.sweep_trials import is_complete, remove
from dpo_train.stages.train import Paused, train, train_home


def steps_of(config: RunConfig, scored: Artifact, parts: int) -> list[int]:
    """After how many steps each of ``parts`` equal parts of the training ends; its own end is the last."""
    total = num_steps(Split(scored, "train").num_pairs, config.train.batch_pairs, config.train.epochs)
    total = min(total, config.train.max_steps or total)
    return sorted({-(-total * part // parts) for part in range(1, parts + 1)})


def policy_after(config: RunConfig, scored: Artifact, executor: Executor, *, step: int) -> Artifact:
    """The policy of the training after so many steps, fewer than it has. Asked for in the order of steps, it is trained
    once: each call goes on from where the one before stands."""
    reporter, home = Reporter.from_environment("train"), train_home(config, scored)
    content = {"training": storage.name_of(home), "step": step}
    target = storage.join(config.store, "paused", identity("paused", content, {}))
    try:
        return open_artifact(target, "paused")
    except StoreError:
        pass
    # What is over cannot be paused any more: that training goes the same way once more, beside it.
    apart = storage.join(config.store, "apart", storage.name_of(home)) if is_complete(home) else None
    try:
        train(config, scored, executor, reporter=reporter, pause_at=step, output=apart)
    except Paused:
        made = paused_policy(config, scored, executor, home=apart or home, step=step, target=target, reporter=reporter)
        if apart is not None:
            remove(apart, reporter)
        return made
    raise AssertionError(f"a training of more than {step} steps pauses there")
