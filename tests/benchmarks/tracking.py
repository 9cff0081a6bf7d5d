"""What logging costs a training: the same steps with and without an MLflow server that is told of them.

    python -m tests.benchmarks.tracking [--steps 60] [--repeats 5] [--hidden 256] [--layers 4]

Trainings of a random Llama take turns, in this process, so that the logging thread competes with the steps for the
interpreter as it would on a laptop: without it, and with it telling a server in a process of its own over HTTP. Times
are per step, and the cost is the median over pairs of neighbours. Beside it stands the work itself, in the same thread
without anything else: a step's line parsed, written to the journal, sent and cut off again. Prints a row of a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, parse_config
from dpo_train.progress import Reporter
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.tracking import RunLog, Tracking, following
from tests.benchmarks.evaluate import make
from tests.mlflow.server import serving

LINES = 500


def config_of(folder: Path, url: str, steps: int) -> RunConfig:
    return parse_config(json.dumps({
        "store": str(folder / "store"), "model": {"path": str(folder / "model")},
        "prepare": {
            "path": str(folder / "pairs.jsonl"), "group_key": "conversation", "validation_fraction": 0.0,
            "heldout_fraction": 0.1,
        },
        "train": {
            "batch_pairs": 16, "max_steps": steps, "epochs": 1000, "row_tokens": 512, "checkpoint_steps": steps,
            "lora": {"rank": 8, "alpha": 16.0},
        },
        "compute": {"executor": "local"}, "tracking": {"uri": url},
    }), [], origin="the benchmark")  # fmt: skip


def seconds_a_step(config: RunConfig, scored: Artifact, folder: Path, *, logged: bool) -> float:
    """Of a whole training, by its own clock."""
    events = folder / "events.jsonl"
    events.write_text("")
    with contextlib.ExitStack() as stack:
        if logged:
            run = RunLog.start(Tracking(config), folder, "train", parent=None, tags={})
            stack.callback(run.close)
            stack.enter_context(following(run, events, "train"))
        reporter = Reporter(str(events), "train")
        made = train(config, scored, InProcess(), reporter=reporter, output=tempfile.mkdtemp(dir=folder))
    return config.train.batch_pairs / made.record.metrics["pairs_per_second"]


def work_a_step(config: RunConfig, folder: Path, line: dict[str, Any]) -> float:
    """Seconds for one step's line, in one thread, in requests of as many lines as two seconds bring."""
    run = RunLog.start(Tracking(config), folder, "train", parent=None, tags={})
    start = time.perf_counter()
    for step in range(LINES):
        run.steps([{**line, "step": step}])
        if step % 10 == 9:
            assert run.send_points(), run.problem
    seconds = time.perf_counter() - start
    run.end("FINISHED")
    assert run.close() is None
    return seconds / LINES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 60), ("repeats", 5), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, serving(Path(root)) as url:
        folder = Path(root)
        size = make(folder, 200, options.hidden, options.layers)
        config = config_of(folder, url, options.steps)
        scored = score_reference(config, prepare(config, InProcess()), InProcess())
        seconds_a_step(config, scored, folder, logged=True)  # imports, caches
        pairs = []
        for index in range(options.repeats):
            order = (False, True) if index % 2 else (True, False)
            found = {logged: seconds_a_step(config, scored, folder, logged=logged) for logged in order}
            pairs.append((found[False], found[True]))
        line = json.loads((folder / "events.jsonl").read_text().splitlines()[-1]).get("metrics", {})
        work = work_a_step(config, folder, line or {f"m/{n}": 0.5 for n in range(16)})
    without, cost = statistics.median(a for a, _ in pairs), statistics.median(b / a - 1 for a, b in pairs)
    print("| parameters | step without | cost with MLflow | the work itself, per step |\n|---|---|---|---|")
    print(f"| {size / 1e6:.1f}M | {without * 1e3:.0f} ms | {cost:+.1%} | {work * 1e3:.2f} ms ({work / without:.2%}) |")


if __name__ == "__main__":
    main()
