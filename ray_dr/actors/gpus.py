"""What NVIDIA's driver says of this node's GPUs, where its library for Python (`pynvml`, of nvidia-ml-py) is installed."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from typing import Any

from ray_dr.model.preflight import GpuState
from ray_dr.model.signal import Xid

WAIT_MS = 1000


def library() -> Any | None:
    """The library with a driver behind it, or None. To be let go of with nvmlShutdown."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no driver: its own errors exist only where it is
        return None
    return nvml


def states() -> tuple[GpuState, ...]:
    """Every GPU of this node; empty without GPUs or the library."""
    nvml = library()
    if nvml is None:
        return ()
    try:
        return tuple(_state(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError as error:
        return (GpuState(0, error=str(error)),)
    finally:
        nvml.nvmlShutdown()


def _state(nvml: Any, index: int) -> GpuState:
    try:
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(gpu)
    except nvml.NVMLError as error:
        return GpuState(index, error=str(error))
    # What a model does not have it says it does not support: then there is nothing against it.
    uncorrected = _ask(nvml, lambda: int(nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)), 0)  # fmt: skip
    _, _, waits, failed = _ask(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(gpu), (0, 0, 0, 0))
    retires = _ask(nvml, lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu), 0)
    why = _ask(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu), 0)
    hardware = nvml.nvmlClocksThrottleReasonHwSlowdown
    return GpuState(
        index, name.decode() if isinstance(name, bytes) else name, uncorrected, bool(waits or retires), bool(failed),
        bool(why & hardware),
    )  # fmt: skip


def _ask(nvml: Any, question: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return question()
    except nvml.NVMLError:
        return otherwise


class Xids:
    """Errors of this node's GPUs, as the driver tells of them, in a thread that ends at once where there is no driver."""

    def __init__(self) -> None:
        self._found: list[Xid] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="xids", daemon=True).start()

    def take(self) -> tuple[Xid, ...]:
        """Those since the last call."""
        with self._lock:
            found, self._found = tuple(self._found), []
        return found

    def close(self) -> None:
        """Listen no more."""
        self._over.set()

    def _run(self) -> None:
        nvml = library()
        if nvml is None:
            return
        with contextlib.suppress(nvml.NVMLError):
            events = nvml.nvmlEventSetCreate()
            for index in range(nvml.nvmlDeviceGetCount()):
                gpu = nvml.nvmlDeviceGetHandleByIndex(index)
                nvml.nvmlDeviceRegisterEvents(gpu, nvml.nvmlEventTypeXidCriticalError, events)
            while not self._over.is_set():
                try:
                    event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
                except nvml.NVMLError_Timeout:
                    continue
                with self._lock:
                    self._found.append(Xid(int(nvml.nvmlDeviceGetIndex(event.device)), int(event.eventData)))
        nvml.nvmlShutdown()
