"""Choose the device, and the precision that it is best at."""

from __future__ import annotations

import os
from typing import Literal

import torch

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Below this many parameters the casts of autocast cost more on a CPU than the faster products save.
SMALL_MODEL = 50_000_000


def best_device() -> torch.device:
    """Return a CUDA device if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_precision(device: torch.device, parameters: int) -> Precision:
    """Return bf16 where the hardware multiplies it natively, fp16 on older GPUs, fp32 for small models on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if parameters >= SMALL_MODEL and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return a context for matrix products in `precision`; fp32 switches it off."""
    return torch.autocast(
        device.type, dtype=DTYPES[precision] if precision != "fp32" else None, enabled=precision != "fp32"
    )


def use_deterministic_algorithms() -> None:
    """Refuse kernels whose result changes from run to run. They are slower on a GPU; a CPU has none to speak of."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
