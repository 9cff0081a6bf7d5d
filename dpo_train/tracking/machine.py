"""How busy this machine is, by MLflow's own meters, for the page "System metrics" of a run."""

from __future__ import annotations

import contextlib
from typing import Any

SECONDS = 10.0


class Machine:
    """CPU and memory, and the GPUs where NVIDIA's library is installed (``nvidia-ml-py``)."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        self._meters: list[Any] = [CPUMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no such library, or no GPU
            self._meters.append(GPUMonitor())
        self.sample()  # the first reading of the CPU only starts its clock

    def sample(self) -> dict[str, float]:
        """By MLflow's names (``system/cpu_utilization_percentage``): since the last sample, or now."""
        found: dict[str, float] = {}
        for meter in self._meters:
            meter.clear_metrics()
            meter.collect_metrics()
            found |= meter.aggregate_metrics()
        return {f"system/{name}": value for name, value in found.items()}
