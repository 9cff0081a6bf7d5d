"""MLflow runs: one parent run per pipeline run, a nested run per stage, under the sweep one per trial.

    rank -> events, metrics.jsonl -> following (a thread) -> RunLog -> journal on disk -> Tracking -> MLflow

Training never talks to MLflow. A rank appends events to a file (progress.py) and ``metrics.jsonl``; the process that
launched the stage follows them, so that curves move while it trains, and completes them at the end. Everything that a
stage tells is on disk before it is sent: where MLflow is away, it waits there.

client: address, time-outs, errors;  experiment: requests that raise;  journal, run_log: written down first, sent then
left_behind: what the next stage sends for one that is gone;  stage, trials: a stage within its run
following, machine: the thread beside it;  search: runs as rows;  wording: descriptions
"""

from __future__ import annotations

from dpo_train.tracking.client import (
    PLUGIN_RUN,
    AwayError,
    TrackingError,
    patience,
    redacted,
    tracking_uri,
)
from dpo_train.tracking.client import connect as _client
from dpo_train.tracking.experiment import CONFIG_FILE, FILES, Data, Tracking, flatten
from dpo_train.tracking.following import TRAININGS, following
from dpo_train.tracking.left_behind import send_left_behind
from dpo_train.tracking.run_log import RunLog

__all__ = [
    "CONFIG_FILE",
    "FILES",
    "PLUGIN_RUN",
    "TRAININGS",
    "AwayError",
    "Data",
    "RunLog",
    "Tracking",
    "TrackingError",
    "_client",
    "flatten",
    "following",
    "patience",
    "redacted",
    "send_left_behind",
    "tracking_uri",
]
