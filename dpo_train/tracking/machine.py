"""How busy this machine is, by MLflow's own meters, for the page "System metrics" of a run."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

SECONDS = 10.0

_LOG = logging.getLogger(__name__)


class Machine:
    """CPU and memory, and the GPUs where NVIDIA's library is installed (``nvidia-ml-py``)."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        self._meters: list[Any] = [CPUMonitor()]
        with contextlib.suppress(Exception):  # no such library, no driver, no right to look: NVML has many errors
            self._meters.append(GPUMonitor())
        self.sample()  # the first reading of the CPU only starts its clock

    def sample(self) -> dict[str, float]:
        """By MLflow's names (``system/cpu_utilization_percentage``): since the last sample, or now."""
        found: dict[str, float] = {}
        for meter in list(self._meters):
            try:
                meter.clear_metrics()
                meter.collect_metrics()
                found |= meter.aggregate_metrics()
            except Exception as error:  # a driver that was lost must not take the stage's metrics with it
                _LOG.warning("%s measures no more: %s", type(meter).__name__, error)
                self._meters.remove(meter)
        return {f"system/{name}": value for name, value in found.items()}
