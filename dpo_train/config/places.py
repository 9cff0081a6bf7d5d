"""Which places on a machine's own disk a config names, and whether a cluster's pods have them."""

from __future__ import annotations

from pathlib import PurePosixPath

from dpo_train.config.judging import DEFAULT_PROMPTS, EndpointJudge, RewardModelJudge
from dpo_train.config.run import RunConfig


def lost_paths(config: RunConfig) -> dict[str, str]:
    """By their keys, the paths of this machine that lie on no volume of ``cluster.volumes``.

    The config's paths are absolute; an address (s3://) is none, and neither is a name on the hub.
    """
    prepare, judge = config.prepare, config.evaluate.judge
    named: dict[str, str | None] = {
        "store": config.store,
        "model.path": config.model.path,
        "model.adapter": config.model.adapter,
        "prepare.path": prepare.path,
        **{f"prepare.sources[{index}].path": source.path for index, source in enumerate(prepare.sources)},
        "prepare.chat_template": prepare.chat_template,
        "prepare.evaluation_prompts": prepare.evaluation_prompts,
        "evaluate.judge.path": judge.path if isinstance(judge, RewardModelJudge) else None,
        "evaluate.judge.prompt": (
            judge.prompt if isinstance(judge, EndpointJudge) and judge.prompt not in DEFAULT_PROMPTS else None
        ),
    }
    return {key: path for key, path in named.items() if path is not None and is_lost(path, config)}


def is_lost(path: str, config: RunConfig) -> bool:
    """Whether it is a path of this machine that no volume holds."""
    path = path.removeprefix("file://")
    return path.startswith("/") and not is_mounted(path, config)


def is_mounted(path: str, config: RunConfig) -> bool:
    """Whether it lies below a path where every pod mounts a volume."""
    parts = PurePosixPath(path)
    return ".." not in parts.parts and any(parts.is_relative_to(mount) for mount in config.cluster.volumes)
