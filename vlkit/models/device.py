"""Which device, and which precision it is best at."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from typing import Literal

import torch

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Below this many parameters the casts of autocast cost more on a CPU than the faster products save.
SMALL_MODEL = 50_000_000


def best_device() -> torch.device:
    """A CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_precision(device: torch.device, parameters: int) -> Precision:
    """bf16 where the hardware multiplies it natively, fp16 on older GPUs, fp32 for small models on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if parameters >= SMALL_MODEL and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in `precision`; fp32 switches it off."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision] if precision != "fp32" else None, enabled=precision != "fp32"
    )


def use_deterministic_algorithms() -> None:
    """Refuse kernels whose result changes from run to run. They are slower on a GPU; a CPU has none to speak of."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, and take it again (glibc; elsewhere nothing happens).

    A training step frees and takes the same gigabytes as the one before. Left to itself, glibc gives large pieces back
    to the system, and has each of their pages filled with zeros when it asks for them again: a tenth of a step on a
    CPU.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
