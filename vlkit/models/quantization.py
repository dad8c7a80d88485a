"""The frozen base in 4 bits (nf4, arXiv 2305.14314): its encoder layers' matrices, an eighth of their size in float32.

Adapters on it are trained in float32. What is small, or sums up, stays as it is: embeddings, norms, pooling heads and
projections.
"""

from __future__ import annotations

from typing import Any

import torch

from vlkit.errors import UsageError
from vlkit.models.device import DTYPES, Precision, best_device

# SigLIP's pooling head uses its weights past their module's forward; a projection is the last word on an embedding.
SPARED = ["visual_projection", "text_projection", "vision_model.head", "text_model.head"]
# Bytes a number takes: 4 bits, and a float32 scale for every 64 of them.
BYTES = 0.5 + 4 / 64


def loading_options(precision: Precision, bits: str = "nf4", spared: list[str] | None = SPARED) -> dict[str, Any]:
    """What from_pretrained needs to load a model in 4 bits, or in 8, multiplied in `precision`.

    Args:
        bits: nf4 or int8.
        spared: modules that stay as they are; None: the output layer, as transformers has it.

    Raises:
        UsageError: bitsandbytes is not there, or does not work on this machine.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--quantize needs bitsandbytes, which does not load: {error}") from None
    how = BitsAndBytesConfig(
        load_in_4bit=bits == "nf4",
        load_in_8bit=bits == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[precision],
        llm_int8_skip_modules=spared,
    )
    return {"quantization_config": how, "device_map": {"": str(best_device())}}


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Keep the weights as they are when the model is evaluated.

    On CPUs with AVX512-BF16 an evaluation packs them anew, after which training fails, or gets no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """How many numbers a parameter stands for, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
