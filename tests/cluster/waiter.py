"""A process that waits for a job: python -m tests.cluster.waiter STORE. Says what it is told, and how it ended."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from dpo_train.cluster.launcher import RayJobLauncher
from tests.cluster.jobs import config_in, job_of


def main() -> None:
    # As launching.py has it: a task's pod is ended by SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = config_in(Path(sys.argv[1]))
    ended = RayJobLauncher(config).run(
        job_of(config),
        tell=lambda text: print(f"told: {text}", flush=True),
        line=lambda text: print(f"line: {text}", flush=True),
    )
    print(f"ended: {ended.reason}", flush=True)


if __name__ == "__main__":
    main()
