"""What a device can do, and what a model asks of it: FLOP/s, memory, multiplications."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import measuring
import torch

# TFLOP/s of dense 16-bit matrix products with sums in float32, from the makers' data sheets.
PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H20": 148,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
    "RTX 3080": 60,
}
# Sides of the matrices whose product is the second yardstick.
SIDES = {"cuda": 8192, "cpu": 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def peak_of(name: str) -> float | None:
    """FLOP/s of the card with this name; None: not known, or a slice of a card."""
    if "MIG" in name:
        return None
    known = [card for card in PEAKS if re.search(rf"\b{card}\b", name)]
    return PEAKS[max(known, key=len)] * 1e12 if known else None


@dataclass(frozen=True)
class Device:
    """Where things are measured, by its own clock and memory."""

    torch: torch.device

    @property
    def is_cuda(self) -> bool:
        """A CUDA device, else the CPU."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """As its maker calls it."""
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else str(measuring.machine()["cpu"])

    def wait(self) -> None:
        """Until everything that was asked of it is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def forget_peak(self) -> None:
        """The peak begins anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)
        else:
            measuring.forget_peak()

    def peak_gb(self) -> float:
        """GB of 2^30 bytes that were taken at most: by tensors on a card, by the whole process on a CPU."""
        return torch.cuda.max_memory_allocated(self.torch) / 2**30 if self.is_cuda else measuring.peak_gb()

    def product_rate(self, precision: str, seconds: float = 1.0) -> float:
        """FLOP/s of products of large square matrices: the best of many."""
        side = SIDES[self.torch.type]
        left, right = (torch.randn(side, side, device=self.torch).to(DTYPES[precision]) for _ in range(2))
        best, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.wait()
            began = time.perf_counter()
            left @ right
            self.wait()
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
        return best


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of one picture and one text, going forward.

    Attributes:
        patches: of the picture's patch embedding, which has no gradient to send on.
    """

    picture: float
    patches: float
    text: float

    @classmethod
    def of(cls, config: Any, tokens: int) -> Work:
        """Of a CLIP or SigLIP. Of the last layer before a pooled position what that position asks for.

        Args:
            tokens: of a text.
        """
        vision, text = config.vision_config, config.text_config
        patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
        embedding = 2 * patches * 3 * vision.patch_size**2 * width
        if config.model_type == "clip":
            return cls(layers(vision, patches + 1, pooled=True), embedding, layers(text, tokens, pooled=True))
        # The pooling head: keys and values of all patches, one query, its MLP.
        head = 2 * (2 * patches + 2) * width**2 + 4 * patches * width + 4 * width * vision.intermediate_size
        return cls(layers(vision, patches) + head, embedding, layers(text, tokens, pooled=True))

    @property
    def training(self) -> float:
        """Of a pair, everything trained: the backward pass is two forward ones."""
        return 3 * (self.picture + self.text) + 2 * self.patches


def layers(part: Any, length: float, count: int | None = None, *, pooled: bool = False) -> float:
    """Multiplications and additions of encoder layers for one item, going forward.

    Args:
        part: a tower's configuration.
        length: positions.
        count: of layers; None: all.
        pooled: only one position is used of the last one: it makes keys and values of all, the rest of that one.
    """
    width, count = part.hidden_size, part.num_hidden_layers if count is None else count
    keys, others = 4 * width**2, 4 * width**2 + 4 * width * part.intermediate_size
    whole = length * (keys + others) + 4 * length**2 * width
    if not pooled:
        return count * whole
    return (count - 1) * whole + length * keys + others + 4 * length * width
