"""No test talks to a model hub, and hypothesis tries the same examples on every machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# A developer's own Ray, MLflow server and image must not take part.
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DPO_IMAGE", "DPO_EVENTS"):
    os.environ.pop(name, None)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns at every fork otherwise
# Two threads of one process wait for each other where others compute beside it: 1.7 to 3 times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# HYPOTHESIS_PROFILE=search looks for new counterexamples; a normal run must not fail by chance.
settings.register_profile("repeatable", deadline=None, database=None, derandomize=True, max_examples=100)
settings.register_profile("search", deadline=None, database=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def address_stays() -> Iterator[None]:
    """A test that leaves an MLflow behind in the environment sends the next ones of its process there."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
