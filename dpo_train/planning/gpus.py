"""Memory and speed of GPUs as their makers give them."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes. A CPU's memory and speed are those of the machine at hand, so they may be unknown."""

    name: str
    memory_bytes: float | None
    tflops: float | None
    """Dense, in bf16 on GPUs (fp16 where there is no bf16); of CPUs what the user says."""
    bandwidth: float | None = None
    """Of its memory, bytes per second."""
    has_bf16: bool = True

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU


CPU = "cpu"

# Memory in GB, dense bf16 TFLOP/s, memory bandwidth in GB/s. Sheets that give tensor figures with 2:4 sparsity (H100,
# H200, B200, L4, L40S) are halved. GB are decimal here: an 80 GB card shows 81,559 MiB (85.5e9 bytes), cards with GDDR6
# show what they say (L4: 23,034 MiB), so that what is said to fit fits.
_SHEETS = {
    "A100-40": (40, 312, 1555),  # NVIDIA A100 data sheet (2021), SXM and PCIe 40 GB
    "A100-80": (80, 312, 2039),  # the same, SXM 80 GB
    "H100": (80, 989, 3350),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "H200": (141, 989, 4800),  # NVIDIA H200 data sheet, SXM
    "B200": (180, 2250, 8000),  # NVIDIA DGX B200 data sheet: 8 GPUs with 1,440 GB and 64 TB/s, 36 PFLOP/s with sparsity
    "L4": (24, 121, 300),  # NVIDIA L4 data sheet: 242 with sparsity
    "L40S": (48, 362, 864),  # NVIDIA L40S data sheet: 733 with sparsity
    "A10G": (24, 70, 600),  # NVIDIA A10G data sheet (the cloud's A10): half of the A10's 125 at its clock
    "T4": (16, 65, 320),  # NVIDIA T4 data sheet, fp16: it has no bf16
    "V100": (32, 125, 900),  # NVIDIA V100 data sheet, SXM2 32 GB, fp16: it has no bf16
    "MI300X": (192, 1307, 5300),  # AMD Instinct MI300X data sheet
}
_WITHOUT_BF16 = {"T4", "V100"}

GPUS = {
    name: Device(
        name=name, memory_bytes=memory * 1e9, tflops=tflops, bandwidth=bandwidth * 1e9,
        has_bf16=name not in _WITHOUT_BF16,
    )
    for name, (memory, tflops, bandwidth) in _SHEETS.items()
}  # fmt: skip
_ALIASES = {"A100": "A100-80", "A10": "A10G", "A100-40GB": "A100-40", "A100-80GB": "A100-80"}


def find_device(
    name: str | None, *, memory_gb: float | None = None, tflops: float | None = None, default: str = "H100"
) -> Device:
    """A GPU by name, or ``cpu``; with memory or speed of your own in place of the maker's.

    Without a name but with memory or speed it is a GPU of which nothing else is known.

    Raises:
        ConfigError: there is no such name.
    """
    if name is None and (memory_gb is not None or tflops is not None):
        name, found = "GPU", Device(name="GPU", memory_bytes=None, tflops=None)
    else:
        name = name or default
        found = _named(name)
    return Device(
        name=found.name,
        memory_bytes=found.memory_bytes if memory_gb is None else memory_gb * 1e9,
        tflops=found.tflops if tflops is None else tflops,
        bandwidth=found.bandwidth,
        has_bf16=found.has_bf16,
    )


def device_of_label(label: str) -> Device | None:
    """The GPU that a node's label names, such as NVIDIA-A100-SXM4-80GB or Tesla-T4; None: none that is known here."""
    words = label.upper().replace("_", "-").split("-")
    if "A100" in words:
        return GPUS["A100-40" if any(word.startswith("40GB") for word in words) else "A100-80"]
    return next((device for name, device in GPUS.items() if name in words), GPUS["A10G"] if "A10" in words else None)


def _named(name: str) -> Device:
    if name.lower() == CPU:
        return Device(name=CPU, memory_bytes=None, tflops=None)
    upper = name.upper().removeprefix("NVIDIA-")
    if (found := GPUS.get(_ALIASES.get(upper, upper))) is None:
        raise ConfigError(
            "--gpu names no GPU that is known here",
            got=name,
            expected=f"{', '.join(GPUS)} or {CPU}",
            fix="name one of these, or give --gpu-memory (GB) and --gpu-tflops (dense bf16) instead",
        )
    return found
