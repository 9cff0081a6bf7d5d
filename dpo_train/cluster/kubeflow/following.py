"""Waits for a run: asks how it stands, less and less often, and goes on asking while the server is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_train.cluster.kubeflow.client import AwayError, Kubeflow, KubeflowError, NotThereError
from dpo_train.cluster.kubeflow.package import Step
from dpo_train.cluster.kubeflow.runs import RunView, view
from dpo_train.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often it is asked, and for how long in vain."""

    first_seconds: float = 1.0
    growth: float = 1.3
    last_seconds: float = 15.0
    away_seconds: float = 1800.0


PATIENCE = Patience()


def follow(
    kubeflow: Kubeflow,
    run_id: str,
    steps: Sequence[Step],
    changed: Callable[[RunView], None],
    tell: Callable[[str], None],
    patience: Patience | None = None,
) -> RunView:
    """The run when it has ended.

    Args:
        changed: is called with the run at first and after every change of a state.
        tell: gets a line when the server goes away, and one when it is back.
        patience: default: ``PATIENCE``.

    Raises:
        RunError: the server is away for longer than ``patience.away_seconds``, or does not tell any more how the run
            stands, because the login has expired, say; the run goes on. Or it was deleted.
    """
    patience = patience or PATIENCE
    pause, last, away_since = patience.first_seconds, None, None
    while True:
        try:
            now = view(kubeflow.tell(kubeflow.runs.run_service_get_run, run_id), steps)
        except AwayError as error:
            if away_since is None:
                away_since = time.monotonic()
                tell(f"{error} The run does not depend on this; asking on.")
            elif time.monotonic() - away_since > patience.away_seconds:
                raise _given_up(run_id, patience, error) from error
        except KubeflowError as error:
            raise _lost_sight(kubeflow, run_id, error) from error
        else:
            if away_since is not None:
                tell("Kubeflow answers again")
                away_since = None
            if _states(now) != last:
                last, pause = _states(now), patience.first_seconds
                changed(now)
            if now.has_ended:
                return now
        time.sleep(pause)
        pause = min(pause * patience.growth, patience.last_seconds)


def _given_up(run_id: str, patience: Patience, error: AwayError) -> RunError:
    return RunError(
        f"Kubeflow has not answered for {patience.away_seconds / 60:g} minutes: {error}",
        fix=f"the run may go on; when Kubeflow is back, `{_wait_on(run_id)}` waits on, and `dpo runs CONFIG --kfp` "
        "shows it",
    )


def _lost_sight(kubeflow: Kubeflow, run_id: str, error: KubeflowError) -> RunError:
    """No mistake in what was given: the run was started."""
    if isinstance(error, NotThereError):
        return RunError(
            f"The run {run_id} was deleted in Kubeflow while it was waited for",
            fix="what it has completed is in the store: the same config submitted again goes on from there",
        )
    return RunError(
        f"The run {run_id} goes on, but Kubeflow does not tell any more how it stands: {error}",
        fix=f"mend that, and `{_wait_on(run_id)}` waits on; the run's page is {kubeflow.link(run_id)}",
    )


def _wait_on(run_id: str) -> str:
    return f"dpo submit CONFIG --attach {run_id}"


def _states(run: RunView) -> tuple[str, ...]:
    return (run.state, *(step.state for step in run.steps))
