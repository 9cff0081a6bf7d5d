"""A model, and no plots."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_train.config import RunConfig
from dpo_train.data import report_page
from tests.tiny import tiny_config


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Any:
    """The report's plots take ten times as long as all the rest; tests/unit/data/test_prepare_report.py has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_plots", lambda content: {})
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("bad"))
