"""`dpo reap`: removes jobs that nobody waits for any more."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

HELP = "remove RayJobs whose waiting task is gone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of `dpo reap`: the period of its sign of life stands on each job, so that no config is asked for."""
    parser.add_argument("--namespace", metavar="N", help="default: the one of this pod, or of the kubeconfig's context")
    parser.add_argument("--dry-run", action="store_true", help="only name them")


def reap(arguments: argparse.Namespace) -> int:
    """Names what it removes, or would remove."""
    from dpo_train.cluster import reaper
    from dpo_train.cluster.kube import Kube

    kube = Kube(arguments.namespace, role="dpo-reaper")
    found = reaper.reap(kube, kube.namespace, datetime.now(UTC), dry_run=arguments.dry_run, tell=print)
    print(f"{len(found)} {'orphaned' if arguments.dry_run else 'removed'} in {kube.namespace}")
    return 0
