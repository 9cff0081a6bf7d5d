"""The demo's data: no conversation twice, labels that can be told apart from chance."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def assets() -> ModuleType:
    pytest.importorskip("chitchat_dataset")
    spec = importlib.util.spec_from_file_location("assets", ROOT / "examples" / "assets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_conversation_is_in_one_record_and_roles_alternate(assets: ModuleType, tmp_path: Path) -> None:
    """So that a split by couple keeps conversations apart; the user speaks first and last."""
    assets.make_pairs(tmp_path / "pairs.jsonl", shuffle_labels=False)

    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    conversations = [name for record in records for name in record["conversations"].split("+")]
    assert len(records) > 1000
    assert len(set(conversations)) == len(conversations) == 2 * len(records)
    for record in records:
        roles = [message["role"] for message in record["prompt"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"][: len(roles)]
        assert roles[-1] == "user"
        assert record["chosen"] != record["rejected"]


def test_control_swaps_half_of_the_labels(assets: ModuleType, tmp_path: Path) -> None:
    """The same records otherwise."""
    assets.make_pairs(tmp_path / "true.jsonl", shuffle_labels=False)
    assets.make_pairs(tmp_path / "control.jsonl", shuffle_labels=True)

    true, control = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("true.jsonl", "control.jsonl")
    )
    swapped = sum(a["chosen"] == b["rejected"] for a, b in zip(true, control, strict=True))
    assert [record["prompt"] for record in true] == [record["prompt"] for record in control]
    assert 0.45 < swapped / len(true) < 0.55
