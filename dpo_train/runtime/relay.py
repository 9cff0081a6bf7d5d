"""Events of workers on other machines: an actor beside the driver writes them into the driver's file."""

from __future__ import annotations

import logging
from typing import Any

from dpo_train import progress

DRAIN_SECONDS = 30.0

_LOG = logging.getLogger(__name__)


class _Writer:
    """Appends lines to files of its own machine, in the order of their arrival."""

    def append(self, path: str, line: str) -> None:
        progress.append(path, line)

    def drain(self) -> None:
        """Comes back once all that was sent before has been written."""


def open_relay(ray: Any, *, grows: bool) -> Any:
    """The actor, or None where there is one machine and every worker reaches the file by itself.

    Args:
        grows: machines may come while the work goes on.
    """
    if not grows and len([node for node in ray.nodes() if node["Alive"]]) < 2:
        return None
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Writer).options(num_cpus=0, scheduling_strategy=here).remote()


def use_relay(relay: Any) -> None:
    """In a worker: from here on its events go to the actor."""
    if relay is not None:
        progress.forward_to(relay.append.remote)


def drain(ray: Any, relay: Any) -> None:
    """In the driver: waits until every event that was sent stands in its file. Events are for show: no error of theirs
    ends the work that they are about."""
    if relay is None:
        return
    try:
        ray.get(relay.drain.remote(), timeout=DRAIN_SECONDS)
    except Exception:
        _LOG.warning("events of other machines may be missing", exc_info=True)
