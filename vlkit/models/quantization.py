"""Load a frozen base in 4 bits (nf4, arXiv 2305.14314): its encoder layers' matrices, an eighth of their float32 size.

Adapters on it are trained in float32. What is small, or adds up errors, keeps its precision: embeddings, norms, pooling
heads and projections.
"""

from __future__ import annotations

from typing import Any

import torch

from vlkit.errors import UsageError
from vlkit.models.device import DTYPES, Precision, best_device

# SigLIP's pooling head uses its weights past their module's forward; a projection's error is the embedding's.
NOT_QUANTIZED = ["visual_projection", "text_projection", "vision_model.head", "text_model.head"]
# Bytes of a quantised weight: 4 bits, and a float32 scale for every 64 of them.
BYTES_PER_WEIGHT = 0.5 + 4 / 64


def loading_options(precision: Precision, bits: str = "nf4", keep: list[str] | None = NOT_QUANTIZED) -> dict[str, Any]:
    """Return the options with which from_pretrained loads a model in 4 bits, or in 8, multiplied in `precision`.

    Args:
        bits: nf4 or int8.
        keep: modules that are not quantised; None: the output layer, as transformers decides.

    Raises:
        UsageError: bitsandbytes is not installed, or does not work on this machine.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--quantize needs bitsandbytes, which cannot be imported: {error}") from None
    config = BitsAndBytesConfig(
        load_in_4bit=bits == "nf4",
        load_in_8bit=bits == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[precision],
        llm_int8_skip_modules=keep,
    )
    return {"quantization_config": config, "device_map": {"": str(best_device())}}


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from packing the weights anew when the model is evaluated.

    It does so on CPUs with AVX512-BF16; training then fails, or gets no gradient.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """Count the numbers of a parameter, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
