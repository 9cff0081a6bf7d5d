"""A registered version served by MLflow over HTTP, here and in an environment made from its own requirements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dpo_train.config import RunConfig
from dpo_train.stages.register import register
from dpo_train.tracking import Tracking
from tests.mlflow.made import made_policy, made_report
from tests.mlflow.server import environment, free_port, running
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

QUESTION = {"messages": [{"role": "user", "content": "tell me about the cat"}], "max_tokens": 5, "top_k": 1}
PREDICT = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model("models:/served@challenger")
print("ANSWER", json.dumps(model.predict(json.loads(sys.argv[1]))[0]["choices"][0]["message"]))
print("PIPELINE", type(mlflow.transformers.load_model("models:/served@challenger")).__name__)
"""


@pytest.fixture(scope="module")
def config(server: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tmp_path_factory.mktemp("served"), tracking__uri=server, register__model_name="served")
    policy = made_policy(config)
    register(config, policy, made_report(config, policy), Tracking(config))
    return config


def ask(python: str, server: str, folder: Path) -> dict[str, Any]:
    """What `mlflow models serve` answers."""
    port = free_port()
    command = [
        *(python, "-m", "mlflow", "models", "serve", "-m", "models:/served@challenger"),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
    ]
    url = f"http://127.0.0.1:{port}"
    # MLflow looks for uvicorn on the PATH, as in an activated environment.
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    variables = environment(MLFLOW_TRACKING_URI=server, PATH=path)
    with running(command, url, "/ping", folder / "serve.log", variables):
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return dict(json.loads(reply.read())[0])


def test_served_version_answers_a_chat_request(config: RunConfig, server: str, tmp_path: Path) -> None:
    """Messages in, a message of the assistant out."""
    answer = ask(sys.executable, server, tmp_path)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.timeout(3600)
def test_its_own_requirements_are_enough(config: RunConfig, server: str, tmp_path: Path) -> None:
    """In an environment with nothing but requirements.txt both flavors load it, and it is served as it is here."""
    python = str(tmp_path / "venv" / "bin" / "python")
    start = time.monotonic()
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")])
    download = [sys.executable, "-m", "mlflow", "artifacts", "download", "--dst-path", str(tmp_path)]
    run([*download, "-u", "models:/served@challenger/requirements.txt"], MLFLOW_TRACKING_URI=server)
    # The CPU build first: the default one brings gigabytes of CUDA libraries.
    run([python, "-m", "pip", "install", "-q", "torch==2.13.0"])
    run([python, "-m", "pip", "install", "-q", "-r", str(tmp_path / "requirements.txt")])
    print(f"environment made in {time.monotonic() - start:.0f} s")

    said = run([python, "-c", PREDICT, json.dumps(QUESTION)], MLFLOW_TRACKING_URI=server)
    assert "PIPELINE TextGenerationPipeline" in said
    message = json.loads(next(line for line in said.splitlines() if line.startswith("ANSWER")).removeprefix("ANSWER"))
    assert message["role"] == "assistant"
    served = ask(python, server, tmp_path)["choices"][0]["message"]
    assert served == message == ask(sys.executable, server, tmp_path)["choices"][0]["message"]


def run(command: list[str], **variables: str) -> str:
    """What a command prints; it must succeed."""
    finished = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout
