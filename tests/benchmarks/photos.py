"""Pictures and captions to measure with: JPEG files on disk, and a model of a given shape in a folder."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 12
CLASSES = 38
SIZES = ("ViT-B/32", "tiny")
SCALE = 20.0


def write_photos(folder: Path, count: int, width: int = 640, height: int = 480) -> list[Path]:
    """JPEG files of quality 90: light of all scales as in nature, objects with edges, and a camera's grain."""
    from PIL import Image, ImageDraw, ImageFilter

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width) ** 1.1
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    for path in paths:
        light = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width))
        forms = Image.fromarray(rng.integers(40, 215, (4, 5, 3), np.uint8)).resize((width, height), 3)
        draw = ImageDraw.Draw(forms)
        for x, y, radius in rng.random((8, 3)) * (width, height, height / 4):
            colour = tuple(rng.integers(30, 220, 3).tolist())
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        soft = np.asarray(forms.filter(ImageFilter.GaussianBlur(0.7)), float)
        grain = rng.normal(0, 3, (height, width, 1))
        mixed = soft + 28 * light[..., None] / light.std() + grain
        Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def captions(count: int, classes: int | None = None) -> list[str]:
    """Captions of twelve words, a few of them frequent; of classes, drawn anew for every picture."""
    rng = np.random.default_rng(1)
    syllables = [first + second for first in "bdfgklmnprst" for second in ("a", "el", "in", "o", "um", "ay")]
    words = sorted({"".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(3000)})
    weights = 1 / (1 + np.arange(len(words)))
    chosen = rng.permutation(words)
    told = [" ".join(rng.choice(chosen, WORDS, p=weights / weights.sum())) for _ in range(classes or count)]
    return told if classes is None else [told[number] for number in rng.integers(0, classes, count)]


def pairs_of(folder: Path, photos: Sequence[Path], texts: Sequence[str]) -> Any:
    """A pairs table over them: pictures of one caption belong together."""
    import pandas as pd

    from vlkit.data.pairs import read_pairs

    def hashed(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    frame = pd.DataFrame({"image": list(map(str, photos)), "text": list(texts)})
    frame["pair_id"] = frame["image_id"] = frame["unit"] = [f"{number:020x}" for number in range(len(frame))]
    frame["text_id"] = frame["image_group"] = frame["text_group"] = list(map(hashed, texts))
    frame = frame.assign(split="train", match=1, origin="original", class_name=None)
    path = folder / f"pairs-{hashed(chr(10).join(texts))}.parquet"
    # Ways that take turns begin at the same moment: each writes one of its own, and the last one stays.
    own = path.with_suffix(f".{os.getpid()}")
    frame.to_parquet(own)
    own.replace(path)
    return read_pairs(path)


def write_model(folder: Path, size: str, texts: Sequence[str], seed: int = 0) -> None:
    """A random CLIP as save_pretrained writes it, with a tokenizer trained on the texts.

    Its scale is the one that sentence-transformers' loss has always: all begin with the same logits.

    The end of a text is the highest token that is ever used: that is where open_clip looks for it.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from vlkit.data.images.spec import PixelSpec
    from vlkit.models import tiny
    from vlkit.models.dual_encoder import DualEncoder
    from vlkit.models.hub import quiet_transformers

    quiet_transformers()
    torch.manual_seed(seed)
    config = tiny.tiny_config("tiny-clip") if size == "tiny" else CLIPConfig()
    learned = tiny._byte_pair_tokenizer(list(texts))
    known = learned.get_vocab()
    wanted = len(known) if size == "tiny" else config.text_config.vocab_size
    merges = [tuple(pair) for pair in _model_of(learned)["merges"]]
    vocabulary = known | {f"unused{number}": number for number in range(len(known), wanted)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    config.logit_scale_init_value = math.log(SCALE)
    text = config.text_config
    text.vocab_size, text.eos_token_id, text.bos_token_id = wanted, learned.eos_token_id, learned.bos_token_id
    text.pad_token_id = learned.eos_token_id
    side = config.vision_config.image_size
    spec = PixelSpec(
        side,
        fit="crop",
        resize=side,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    DualEncoder(CLIPModel(config), tokenizer, spec, str(folder)).save(folder)


def _model_of(tokenizer: Any) -> dict[str, Any]:
    import json

    return dict(json.loads(tokenizer.backend_tokenizer.to_str())["model"])


def useful_flops(model: Path, texts: Sequence[str], batch: int, upper: int = 2) -> dict[str, float]:
    """Multiplications and additions of one forward pass a picture, by part: no padding, no text twice in a batch.

    A tower's last layer makes keys and values of all positions, and everything else of the one that is pooled.

    Args:
        model: folder of a CLIP.
        texts: of the pictures, in the order of the batches; each batch encodes its distinct ones.

    Returns:
        "patches", "image" (all layers; "upper" of them are the last ones), "text" and "heads", the projections.
    """
    from cards import layers
    from transformers import CLIPConfig, CLIPTokenizer

    config = CLIPConfig.from_pretrained(model)
    counts = [len(ids) for ids in CLIPTokenizer.from_pretrained(model)(list(texts))["input_ids"]]
    distinct = sum(len(set(texts[start : start + batch])) for start in range(0, len(texts), batch)) / len(texts)

    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return {
        "patches": 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size,
        "image": layers(vision, patches + 1, pooled=True),
        "upper": layers(vision, patches + 1, min(upper, vision.num_hidden_layers - 1), pooled=True),
        "text": layers(text, sum(counts) / len(counts), pooled=True) * distinct,
        "heads": 2 * (vision.hidden_size + text.hidden_size) * config.projection_dim,
    }


def training_flops(model: Path, texts: Sequence[str], batch: int, forwards: int = 1) -> float:
    """The same of training everything: the backward pass is two forward ones.

    Args:
        forwards: passes before it; two where what does not fit is embedded again.
    """
    parts = useful_flops(model, texts, batch)
    # Nobody needs the gradient of the pixels.
    rest = parts["image"] + parts["text"] + parts["heads"]
    return (forwards + 2) * rest + (forwards + 1) * parts["patches"]
