"""Runs that go on while they are waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from tests.kubeflow.argo import Play
from tests.kubeflow.server import Server

Scene = Callable[[Play], Iterator[None]]
STEPS = ("resolve", "prepare", "sft", "score-reference", "sweep", "train", "evaluate", "register")


def stage(server: Server, scene: Scene) -> None:
    """Lets the only run go on by one `yield` of the scene whenever it is asked for."""
    lock, scenes = threading.Lock(), []

    def act() -> None:
        with lock:
            if not scenes:
                (run_id,) = server.state.runs
                scenes.append(scene(Play(server.state, run_id)))
            next(scenes[0], None)

    server.before("/apis/v2beta1/runs/[^/:]+", act)


def whole(outcome: str) -> Scene:
    """Everything succeeds, and the last step prints what came of it."""

    def scene(play: Play) -> Iterator[None]:
        for step in STEPS:
            play.start(step)
            yield
            play.succeed(step, outcome if step == "register" else "")
            yield
        play.end("SUCCEEDED")
        yield

    return scene
