"""Where an engine computes: what each value of --device stands for on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from kvist.proto.errors import ConfigInvalid

LEAST_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)  # from there on Triton compiles e4m3


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model and its pages are.

    Attributes:
        kind: "cpu"; "cuda"; or "interpreter": the code for CUDA devices, its kernels run by
            Triton's interpreter and its copies by a thread, which is how it is tested.
        torch: as torch names it.
        name: for people.
    """

    kind: str
    torch: str
    name: str

    @property
    def host(self) -> bool:
        """The model computes in this process's own memory."""
        return self.kind == "cpu"


CPU = Device("cpu", "cpu", "CPU")


def find_device(asked: str) -> Device:
    """The device that a checked --device means here.

    Raises:
        ConfigInvalid: it is not there, or lacks something; the message says what.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return CPU
    if importlib.util.find_spec("triton") is None:
        raise ConfigInvalid(
            f"--device {asked}: its kernels need triton; run pip install '.[gpu]' in a checkout "
            "of Kvist, or give --device cpu"
        )
    if asked == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigInvalid(
                "--device interpreter is for tests of the code for CUDA devices, a thousand times "
                "slower than cpu: set TRITON_INTERPRET=1 before the start, or give --device cpu"
            )
        return Device("interpreter", "cpu", "Triton's interpreter")
    return _find_cuda(asked)


def _find_cuda(asked: str) -> Device:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", which was built without CUDA,"
        raise ConfigInvalid(
            f"--device {asked}: torch {torch.__version__}{built} sees no CUDA device; "
            "give --device cpu"
        )
    number, there = int(asked.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= there:
        raise ConfigInvalid(f"--device {asked}: there are {there}, cuda:0 to cuda:{there - 1}")
    name = torch.cuda.get_device_name(number)
    if missing := _lacks(number, LEAST_CAPABILITY):
        raise ConfigInvalid(
            f"--device {asked}: {name} has {missing}, which has bfloat16; give --device cpu"
        )
    return Device("cuda", f"cuda:{number}", name)


def check_float8(device: Device, asked: str) -> None:
    """Raises ConfigInvalid when kernels on a device cannot read float8 pages.

    Args:
        device: from find_device, not the CPU.
        asked: a checked --kv-cache-dtype that is float8.
    """
    if device.kind != "cuda":
        return
    number = torch.device(device.torch).index or 0
    if missing := _lacks(number, FLOAT8_CAPABILITY):
        raise ConfigInvalid(
            f"--kv-cache-dtype {asked}: {device.name} has {missing}, which has float8; leave it out"
        )


def _lacks(number: int, least: tuple[int, int]) -> str:
    """What a CUDA device has, and what of the kernels' needs it lacks; "" if nothing."""
    capability = torch.cuda.get_device_capability(number)
    if capability >= least:
        return ""
    have, need = (".".join(map(str, one)) for one in (capability, least))
    return f"compute capability {have}; the kernels need {need}"
