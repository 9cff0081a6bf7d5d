"""`dpo reap`: removes jobs that nobody waits for any more, and those that ended long ago."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta

HELP = "remove RayJobs whose waiting task is gone, and those that ended a day ago"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of `dpo reap`: the period of its sign of life stands on each job, so that no config is asked for."""
    parser.add_argument("--namespace", metavar="N", help="default: the one of this pod, or of the kubeconfig's context")
    parser.add_argument(
        "--keep-hours", metavar="H", type=_hours, default=24.0, help="how long ended jobs stay (default: 24)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only name them")


def reap(arguments: argparse.Namespace) -> int:
    """Names what it removes, or would remove."""
    from dpo_train.cluster import reaper
    from dpo_train.cluster.kube import Kube

    kube = Kube(arguments.namespace, role="dpo-reaper")
    found = reaper.reap(
        kube,
        kube.namespace,
        datetime.now(UTC),
        keep=timedelta(hours=arguments.keep_hours),
        dry_run=arguments.dry_run,
        tell=print,
    )
    print(f"{len(found)} {'to be removed' if arguments.dry_run else 'removed'} in {kube.namespace}")
    return 0


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < 24 * 3650:  # nan is neither
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours (0, 0.5, 24, ...)")
    return hours
