"""`dpo promote` and `dpo rollback`: which registered version is the champion."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpo_train import launch
from dpo_train.config import RunConfig, load_config

if TYPE_CHECKING:
    from dpo_train.registry import Promotion


def promote(arguments: argparse.Namespace) -> int:
    """Makes ``arguments.version``, an alias or number and by default the challenger, the champion."""
    from dpo_train import registry

    def move(client: Any, config: RunConfig) -> Promotion:
        return registry.promote(client, config.register.model_name, arguments.version or config.register.alias)

    return _moved(arguments, move)


def rollback(arguments: argparse.Namespace) -> int:
    """Makes the champion before this one champion again."""
    from dpo_train import registry

    return _moved(arguments, lambda client, config: registry.rollback(client, config.register.model_name))


def _moved(arguments: argparse.Namespace, move: Callable[[Any, RunConfig], Promotion]) -> int:
    from dpo_train.tracking import Tracking

    config = load_config(arguments.config, arguments.overrides)
    launch.check_tracking(config)
    tracking = Tracking(config)
    with tracking.errors():
        moved = move(tracking.client, config)
    before = "none" if moved.previous is None else f"version {moved.previous}"
    print(f"champion of {moved.name}: version {moved.version} (before: {before})")
    return 0
