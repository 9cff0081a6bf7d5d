"""A training's policies on its way: the paper's figures show them after every so many steps."""

from __future__ import annotations

from collections.abc import Iterator

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
from dpo_train.stages.train import Paused, train, train_home


def policies(config: RunConfig, scored: Artifact, executor: Executor, *, parts: int) -> Iterator[tuple[int, Artifact]]:
    """(step, policy) after each of ``parts`` equal parts of the training, its end included. Interrupted, it goes on
    where the training stands; one that is over is not trained again."""
    reporter, home = Reporter.from_environment("train"), train_home(config, scored)
    total = num_steps(Split(scored, "train").num_pairs, config.train.batch_pairs, config.train.epochs)
    total = min(total, config.train.max_steps or total)
    for step in sorted({-(-total * part // parts) for part in range(1, parts)}):
        content = {"training": storage.name_of(home), "step": step}
        target = storage.join(config.store, "paused", identity("paused", content, {}))
        try:
            yield step, open_artifact(target, "paused")
        except StoreError:
            try:
                train(config, scored, executor, reporter=reporter, pause_at=step)
            except Paused:
                yield (
                    step,
                    paused_policy(config, scored, executor, home=home, step=step, target=target, reporter=reporter),
                )
    yield total, train(config, scored, executor, reporter=reporter)
