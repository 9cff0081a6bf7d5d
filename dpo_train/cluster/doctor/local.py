"""This machine: packages, GPU, disk, data and model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dpo_train import storage
from dpo_train.cluster.doctor.answers import Answer, failed, passed, unchecked
from dpo_train.cluster.doctor.services import remote_inputs, uses_kubeflow
from dpo_train.cluster.kubeflow.reach import check_reach
from dpo_train.config import RunConfig
from dpo_train.errors import first_line

DISTRIBUTION = "dpo-train"
STAGES = {"prepare", "sft", "score_reference", "sweep", "train", "evaluate"}
"""Those that may be launched elsewhere."""
GPU_LIMIT_S = 100.0
LEAST_BYTES = 1 << 30
_CHECKPOINTS = 13
"""fp32 weights and two moments are 6 times bf16 weights; two such checkpoints at a time, and the policy itself."""

_ASK_TORCH = """
import json, torch
n = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"torch": torch.__version__, "built": torch.version.cuda or torch.version.hip,
                  "gpus": [torch.cuda.get_device_name(i) for i in range(n)]}))
"""


def runs_here(config: RunConfig) -> bool:
    """Whether heavy stages run on this machine."""
    return config.cluster.launcher == "none" or not STAGES.issubset(config.cluster.stages)


def is_mounted(config: RunConfig, path: str) -> bool:
    """Whether a path lies on a volume that only the cluster's pods need to see."""
    return any(Path(path).is_relative_to(mount) for mount in config.cluster.volumes)


def packages(config: RunConfig) -> Answer:
    """Whether what the config needs is installed, in versions that do."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return unchecked("dpo is not installed as a package", "pip install dpo-train")
    extras = _extras(config)
    wrong: dict[str, str] = {}
    good: dict[str, str] = {}
    for extra in ("", *extras):
        for requirement in map(Requirement, required):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.marker is None and extra:
                continue
            found = _version(requirement.name)
            if found is None:
                wrong[f"{requirement.name} is missing{_why(extra, extras)}"] = extra
            elif not requirement.specifier.contains(found, prereleases=True):
                wrong[f"{requirement.name} is {found}, needed {requirement.specifier}{_why(extra, extras)}"] = extra
            elif extra or requirement.name == "torch":
                good[requirement.name] = found
    if wrong:
        missing = ",".join(sorted({extra for extra in wrong.values() if extra}))
        named = f"{DISTRIBUTION}[{missing}]" if missing else DISTRIBUTION
        return failed("; ".join(wrong), f"pip install --upgrade '{named}'")
    versions = ", ".join(f"{name} {version}" for name, version in good.items())
    own = importlib.metadata.version(DISTRIBUTION)
    return passed(f"Python {platform.python_version()}, dpo {own}, {versions}")


def gpu(config: RunConfig) -> Answer:
    """What PyTorch, asked in a process of its own, can do with this machine's GPUs."""
    try:
        answer = subprocess.run(  # noqa: S603 # our own interpreter and program
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=GPU_LIMIT_S, check=False
        )
        found: dict[str, Any] = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        return failed(
            f"PyTorch does not find out about GPUs within {GPU_LIMIT_S:g} s", "see whether nvidia-smi answers"
        )
    except ValueError:
        words = (answer.stderr.strip() or "no word").splitlines()[-1]
        return failed(f"PyTorch cannot be asked about GPUs: {words[:300]}", "mend the installation of torch")
    return _judged(config, found, _driver())


def _judged(config: RunConfig, found: Mapping[str, Any], driver: str | None) -> Answer:
    gpus, version = found["gpus"], found["torch"]
    if not gpus:
        if driver is not None:
            why = "this torch is built for CPUs" if found["built"] is None else f"it is built for {found['built']}"
            return failed(
                f"there is a GPU (driver {driver}), and torch {version} cannot use it: {why}",
                "install the torch of this driver (pytorch.org), renew the driver, or set compute.device=cpu",
            )
        if config.compute.device == "cuda":
            return failed("compute.device=cuda, and there is no GPU driver here", "set compute.device=auto or cpu")
        return passed(f"no GPU: trains on {os.cpu_count()} CPU cores")
    workers = config.compute.workers
    if config.compute.executor == "ray" and "RAY_ADDRESS" not in os.environ and workers > len(gpus):
        return failed(
            f"compute.workers={workers}, and there are {len(gpus)} GPUs ({gpus[0]})",
            f"set compute.workers={len(gpus)}, or RAY_ADDRESS to a cluster that has more",
        )
    return passed(f"{len(gpus)} x {gpus[0]}, driver {driver or 'unknown'}, torch {version} for {found['built']}")


def disk(config: RunConfig) -> Answer:
    """Whether the store can be written, and has room for the checkpoints of a training. Leaves nothing behind."""
    folder = next(each for each in (Path(config.store), *Path(config.store).parents) if each.exists())
    if folder != Path(config.store) and is_mounted(config, config.store):
        return unchecked(f"{config.store} is on a volume that this machine does not see")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return failed(f"{config.store} cannot be written: {error.strerror}", "set store to a folder of yours")
    free, need = shutil.disk_usage(folder).free, _need_bytes(config)
    words = f"{config.store}: {free / 1e9:,.1f} GB free"
    if free < need:
        return failed(
            f"{words}, and a training may take {need / 1e9:,.1f} GB for checkpoints and policy",
            "free some space (`dpo gc` lists outputs that nothing refers to), or set store to a larger disk",
        )
    return passed(words)


def data(config: RunConfig) -> Answer:
    """Whether the local data are there and can be read, by their names and sizes."""
    from dpo_train.data.sources import plan

    counted = 0
    for index, source in enumerate(config.prepare.all_sources):
        if "://" in source.path or (is_mounted(config, source.path) and not Path(source.path).exists()):
            continue
        plan(source, index)
        counted += 1
    if not counted:
        return unchecked("the data are on a volume that this machine does not see")
    return passed(f"{counted} source{'s' if counted > 1 else ''} found")


def model(config: RunConfig) -> Answer:
    """Whether the model's folder is one. A hub's name is not asked for: that would be a download."""
    path = config.model.path
    folder = Path(path)
    if not folder.is_absolute():
        return unchecked(f"{path} is a name on the hub, which is asked when it is needed")
    if not folder.is_dir() and is_mounted(config, path):
        return unchecked(f"{path} is on a volume that this machine does not see")
    if not (folder / "config.json").is_file():
        return failed(f"there is no model at {path}", "set model.path to a folder with config.json and safetensors")
    size = _weights_bytes(folder)
    if not size:
        return failed(f"{path} holds no *.safetensors", "save the model as safetensors (save_pretrained)")
    return passed(f"{path}, {size / 1e9:,.2f} GB of weights")


def reach(config: RunConfig) -> Answer:
    """Whether pods see what the config names: nothing that is on this machine alone."""
    check_reach(config)
    return passed("pods see every place that the config names")


def has_local_data(config: RunConfig) -> bool:
    """Whether some of the data are named by a path."""
    return any("://" not in source.path for source in config.prepare.all_sources)


def _extras(config: RunConfig) -> dict[str, str]:
    """The extras that the config needs, each with its reason."""
    here = runs_here(config)
    wanted = {
        "ray": ("compute.executor=ray", here and config.compute.executor == "ray"),
        "mlflow": ("every run is tracked", True),
        "s3": ("addresses at s3://", storage.is_remote(config.store) or bool(remote_inputs(config))),
        "k8s": ("cluster.launcher=rayjob", config.cluster.launcher == "rayjob"),
        "kfp": ("kubeflow.host", uses_kubeflow(config)),
        "hub": ("data at hf://", any(s.path.startswith("hf://") for s in config.prepare.all_sources)),
        "optuna": ("sweep.search=optuna", here and config.sweep.search == "optuna"),
        "qlora": ("model.quantization", here and config.model.quantization is not None),
    }
    return {name: why for name, (why, is_so) in wanted.items() if is_so}


def _why(extra: str, extras: Mapping[str, str]) -> str:
    return f" ({extras[extra]})" if extra else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver; None: there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"that does not answer ({first_line(error)[:100]})"
    return (answer.stdout.strip().splitlines() or ["unknown"])[0]


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _need_bytes(config: RunConfig) -> float:
    """Roughly what a training writes. Adapters are small."""
    folder = Path(config.model.path)
    if config.train.lora is not None or not folder.is_dir():
        return LEAST_BYTES
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    kind = str(settings.get("dtype") or settings.get("torch_dtype") or "")
    in_bf16 = _weights_bytes(folder) / (2 if kind == "float32" else 1)
    return max(LEAST_BYTES, _CHECKPOINTS * in_bf16)
