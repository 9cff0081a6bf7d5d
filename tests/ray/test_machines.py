"""Several machines, as far as one can play them: Ray nodes of their own, with their own cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpo_train.config import to_text
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Follower
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config

_SCRIPT = """
import sys, threading, time
from dataclasses import dataclass
from pathlib import Path
from dpo_train.artifacts import open_artifact
from dpo_train.config import parse_config
from dpo_train.progress import Reporter
from dpo_train.runtime.executor import RayExecutor
from dpo_train.runtime.session import import_ray
from dpo_train.stages import train

ray = import_ray()
from ray.cluster_utils import Cluster

config_text, scored, output, folder = sys.argv[1:]
folder = Path(folder)

@dataclass(frozen=True)
class StaysAtStep8(Reporter):
    def progress(self, done, total, unit="pairs", **metrics):
        super().progress(done, total, unit, **metrics)
        if done == 8 and not (folder / "asked").exists():
            (folder / "asked").touch()
            threading.Event().wait()

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

config = parse_config(config_text)
reporter = StaysAtStep8(str(folder / "events.jsonl"), "train")
errors = []

def work():
    try:
        train(config, open_artifact(scored), RayExecutor(config.compute), reporter=reporter, output=output)
    except BaseException as error:
        errors.append(error)

# Machines are added by the main thread: Ray wants signal handlers for them.
thread = threading.Thread(target=work)
thread.start()
while thread.is_alive() and not (folder / "asked").exists():
    time.sleep(0.05)
cluster.add_node(num_cpus=1)
thread.join()
ray.shutdown()
cluster.shutdown()
if errors:
    raise errors[0]
"""


@pytest.mark.slow
def test_training_grows_to_a_machine_that_comes_and_events_of_all_machines_arrive(tmp_path: Path) -> None:
    """One worker is all that there is room for; once a second machine has come, it is stopped and two go on.

    The weights are those of an unbroken training on one rank to 1e-4 of their change, and the driver's file has every
    step: events of workers that are not on its machine go through an actor beside it.
    """
    local = tiny_config(tmp_path, train__checkpoint_steps=4)
    scored = score_reference(local, prepare(local, InProcess()), InProcess())
    alone = train(local, scored, InProcess(), output=tmp_path / "alone")
    config = tiny_config(
        tmp_path, train__checkpoint_steps=4, compute__executor="ray", compute__workers=2, compute__min_workers=1,
        compute__device="cpu",
    )  # fmt: skip

    command = [sys.executable, "-c", _SCRIPT, to_text(config), scored.home, str(tmp_path / "grown"), str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    notes = [json.loads(path.read_text()) for path in (tmp_path / "grown" / "ranks").glob("*.json")]
    assert sorted((note["rank"], note["world_size"]) for note in notes) == [(0, 2), (1, 2)]
    steps = [event["done"] for event in Follower(tmp_path / "events.jsonl").new() if event["kind"] == "progress"]
    assert steps[:8] == [*range(1, 9)]
    assert steps[8] in {5, 9}  # from the checkpoint of step 4, or from that of step 8 if it was whole
    assert steps[8:] == [*range(steps[8], 21)]
    losses = [[line["loss"] for line in read_history(home / METRICS_FILE)] for home in (alone.path, tmp_path / "grown")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, other = (load_file(h / "adapter/adapter_model.safetensors") for h in (alone.path, tmp_path / "grown"))
    for name, weight in one.items():
        assert (other[name] - weight).norm() <= 1e-4 * max(weight.norm(), 1e-6), name
