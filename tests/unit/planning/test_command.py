"""`dpo plan` as a person meets it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cli import plan
from dpo_train.cli.plan import check_fit
from dpo_train.config import LoraConfig
from dpo_train.errors import ConfigError, ModelError
from dpo_train.planning.gpus import device_of_label
from dpo_train.planning.shapes import shape
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"store: {tmp_path / 'store'}\nmodel: {{path: {tmp_path}}}\nprepare: {{path: pairs.jsonl}}\n")
    return path


def _plan(config: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    plan.add_arguments(parser)
    parser.add_argument("overrides", nargs="*")
    arguments, rest = parser.parse_known_args([str(config), *words])
    arguments.overrides = [*arguments.overrides, *rest]
    return plan.plan(arguments)


def _json(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> dict[str, Any]:
    assert _plan(config, "--json", *words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_that_fits_says_so_with_parts_time_and_cost(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA of 8 billion weights on an H100, at 2.5 an hour."""
    monkeypatch.setenv("COLUMNS", "160")
    code = _plan(config_file, "--shape", "llama-8b", "--gpu", "H100", "--price", "2.5", "train.lora={}")

    out = capsys.readouterr().out
    assert code == 0
    assert "Fits on H100" in out
    for text in ("activations kept of a row", "score_reference", "estimates until measured", "pairs/s"):
        assert text in out


def test_a_run_that_does_not_fit_says_what_to_change(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of 8 billion weights on an 80 GB GPU: workers, adapters, four bits, a larger GPU; with --check exit 2."""
    code = _plan(config_file, "--shape", "llama-8b", "--gpu", "A100-80", "--check", "--json")

    found = json.loads(capsys.readouterr().out)
    assert code == 2
    assert found["fits"] is False
    changes = [" ".join(advice["changes"]) for advice in found["advice"]]
    assert any("compute.workers=4" in text for text in changes)
    assert any("train.lora={}" in text for text in changes)
    assert all(advice["total_bytes"] <= 80e9 for advice in found["advice"][:-1])


def test_the_numbers_for_machines_add_up(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts to totals, GPUs and seconds to cost."""
    found = _json(capsys, config_file, "--shape", "llama-1b", "--price", "3", "--pairs", "1000", "--prompt-tokens",
                  "100", "--answer-tokens", "50", "sweep.betas=[0.1, 0.2]")  # fmt: skip

    for stage in found["memory"]:
        assert sum(stage["parts_bytes"].values()) == pytest.approx(stage["total_bytes"])
    assert [stage["stage"] for stage in found["time"]] == ["score_reference", "sweep", "train", "evaluate"]
    for stage in found["time"]:
        assert stage["cost"] == pytest.approx(stage["gpus"] * stage["seconds"] / 3600 * 3)
    assert found["data"]["train_pairs"] == 800
    assert found["data"]["origin"] == "--answer-tokens, --pairs, --prompt-tokens"


def test_a_mixture_of_experts_is_planned(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OLMoE, 1 of 7 billion weights at work: all of them in memory, and the machine is told both numbers."""
    found = _json(capsys, config_file, "--shape", "olmoe-1b-7b", "--gpu", "B200", "evaluate.num_prompts=0")

    assert found["model"]["weights"] == found["model"]["trained_weights"] == 6_919_161_856
    assert found["model"]["active_weights"] == 1_282_017_280
    train = next(stage for stage in found["memory"] if stage["stage"] == "train")
    assert train["parts_bytes"]["weights"] == 4 * 6_919_161_856
    assert found["fits"] is True
    assert any("memory holds all of them" in note for note in found["notes"])


def test_an_unknown_gpu_is_the_users_mistake(config_file: Path) -> None:
    """With the names that there are."""
    with pytest.raises(ConfigError, match=r"Z9000.*H100.*--gpu-memory") as caught:
        _plan(config_file, "--shape", "llama-8b", "--gpu", "Z9000")

    assert caught.value.exit_code == 2


def test_an_unknown_shape_is_the_users_mistake(config_file: Path) -> None:
    """With the shapes that there are."""
    with pytest.raises(ConfigError, match="llama-405b"):
        _plan(config_file, "--shape", "llama-9000b")


def test_a_model_without_a_config_is_the_users_mistake(config_file: Path) -> None:
    """Nothing is looked for on a hub."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        _plan(config_file)


def test_ones_own_gpu_is_given_by_memory_and_speed(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a name."""
    found = _json(
        capsys, config_file, "--shape", "llama-1b", "--gpu-memory", "40", "--gpu-tflops", "100", "train.lora={}"
    )

    assert found["device"] == {"name": "GPU", "memory_bytes": 40e9, "tflops": 100}


def test_prepared_data_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths and counts come from the store's own output, and the model's config from its folder; a CPU's memory is
    planned and its time not guessed."""
    config = tiny_config(tmp_path, compute__device="cpu")
    made = prepare(config, executor=InProcess())
    file = tmp_path / "run.yaml"
    from dpo_train.config.loading import to_text

    file.write_text(to_text(config))

    found = _json(capsys, file)

    assert found["device"]["name"] == "cpu"
    assert found["data"]["origin"] == f"measured: {made.address}"
    assert found["data"]["train_pairs"] == made.record.counts["pairs/train"]
    assert all(stage["seconds"] is None for stage in found["time"])
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["prepare"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("NVIDIA-A100-SXM4-80GB", "A100-80"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "A100-40"),
        ("NVIDIA-H100-80GB-HBM3", "H100"),
        ("NVIDIA-H200", "H200"),
        ("Tesla-T4", "T4"),
        ("NVIDIA-A10G", "A10G"),
        ("NVIDIA-L40S", "L40S"),
        ("NVIDIA-L4", "L4"),
        ("NVIDIA-GeForce-RTX-4090", None),
    ],
)
def test_a_nodes_label_names_its_gpu(label: str, expected: str | None) -> None:
    found = device_of_label(label)
    assert (None if found is None else found.name) == expected


def test_a_run_that_would_not_fit_is_refused_before_it_is_submitted(tmp_path: Path) -> None:
    """All weights of 8 billion on one GPU; with adapters it fits. What cannot be told is said."""
    model = tmp_path / "llama-8b"
    shape("llama-8b").save_pretrained(model)
    config = tiny_config(tmp_path, model__path=str(model), compute__device="cuda", train__lora=None)
    workers = replace(config.cluster.workers, gpu_type="NVIDIA-H100-80GB-HBM3")
    full = replace(config, cluster=replace(config.cluster, workers=workers))
    adapters = replace(full, train=replace(full.train, lora=LoraConfig(rank=16)))

    with pytest.raises(ConfigError, match="does not fit on H100"):
        check_fit(full)
    assert check_fit(adapters).startswith("fits on H100")
    assert "gpu_type=None names no GPU" in check_fit(config)
