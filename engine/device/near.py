"""Threads near a device: on the cores of the NUMA node that it is plugged into."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvist.engine.device.found import Device
from kvist.proto.numa import NODES, parse_list

PCI = "sys/bus/pci/devices"


@contextmanager
def near(device: Device) -> Iterator[None]:
    """Threads that are started in here run on the device's node: what they copy does not cross.

    Nothing changes for other threads, nor where the node is not known. Raises nothing.
    """
    before = os.sched_getaffinity(0)
    cores = near_cores(pci_address(device), before)
    if cores == before:
        yield
        return
    with suppress(OSError):  # of the calling thread; what it starts takes after it
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def near_cores(address: str, cores: set[int], root: Path = Path("/")) -> set[int]:
    """Those of some cores that are on the node of a PCI device; all, where there are none.

    Args:
        address: as /sys writes it, like 0000:1b:00.0; "" for a device that is no such. root: before
            /sys.
    """
    try:
        node = int((root / PCI / address / "numa_node").read_text()) if address else -1
        listed = (root / NODES / f"node{node}" / "cpulist").read_text() if node >= 0 else ""
    except (OSError, ValueError):
        return cores
    return cores & parse_list(listed) or cores


def pci_address(device: Device, driver: str = "libcuda.so.1") -> str:
    """Where a CUDA device is plugged in; "" of another one, and where the driver does not say.

    torch has started the driver, which numbers devices as torch does.
    """
    if device.kind != "cuda":
        return ""
    name, handle = ctypes.create_string_buffer(32), ctypes.c_int()
    number = int(device.torch.partition(":")[2] or 0)
    try:
        cuda = ctypes.CDLL(driver)
        failed = cuda.cuDeviceGet(ctypes.byref(handle), number)
        failed = failed or cuda.cuDeviceGetPCIBusId(name, len(name), handle)
    except (OSError, AttributeError):
        return ""
    return "" if failed else name.value.decode().lower()
