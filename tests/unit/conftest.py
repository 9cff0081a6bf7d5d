"""Fixtures of the unit tier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are faster on one thread, and its sums do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, shared by all tests; nobody writes into it."""
    return tiny_model(tmp_path_factory.mktemp("model"))
