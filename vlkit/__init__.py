"""vlkit: adapt vision-language models to a domain, and know whether it helped.

From Python:

    encoder = vlkit.load("runs/mine")                    # or a model's folder, or a hub name
    images = encoder.encode_images(["tart.jpg"])         # float32 [images, width], unit rows
    texts = encoder.encode_texts(["a photo of a tart"])  # float32 [texts, width], unit rows
    hits = vlkit.search("indexes/mine", "a tart with plums", k=5)
    pairs = vlkit.read_pairs("data/mine")
    labels = vlkit.label_matrix(image_groups, text_groups, "multi-positive")

The names are imported when they are first used: `import vlkit` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkit.data.labels import label_matrix
    from vlkit.data.pairs import Pairs, read_pairs
    from vlkit.inference.encoder import Encoder, load
    from vlkit.inference.search.search import search_index as search

__version__ = "0.1.0"
__all__ = ["Encoder", "Pairs", "__version__", "label_matrix", "load", "read_pairs", "search"]

_SOURCES = {
    "Encoder": ("vlkit.inference.encoder", "Encoder"),
    "Pairs": ("vlkit.data.pairs", "Pairs"),
    "label_matrix": ("vlkit.data.labels", "label_matrix"),
    "load": ("vlkit.inference.encoder", "load"),
    "read_pairs": ("vlkit.data.pairs", "read_pairs"),
    "search": ("vlkit.inference.search.search", "search_index"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'vlkit' has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    globals()[name] = value = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
