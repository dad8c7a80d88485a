"""Whether a model's tokenizer is on this machine: asked without importing torch, answered without the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlkit.config.data import TINY_MODELS
from vlkit.errors import VlkitError


def tokenizer_at_hand(name: str) -> tuple[Callable[[Sequence[str]], list[list[int]]], int] | None:
    """How a model cuts texts into tokens, and how many it takes; None where that would need the network.

    A tiny model's tokenizer is made from the training texts and is not known before.
    """
    if name in TINY_MODELS or not (Path(name).exists() or in_hub_cache(name)):
        return None
    from vlkit.models.dual_encoder import load_tokenizer

    try:
        return load_tokenizer(name)
    except VlkitError:
        return None


def in_hub_cache(name: str) -> bool:
    """The hub's cache holds this model's configuration and a tokenizer."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return False
    return all(isinstance(path, str) for path in found)
