"""Whether a GPU computes what it should: tiny models, one line a check."""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cards import Device
from torch.utils._python_dispatch import TorchDispatchMode

PAIRS, SIDE = 16, 64
FP32_WITHIN = 1e-4


class Found(NamedTuple):
    """What a check came to; passed None: it could not be made."""

    passed: bool | None
    told: str


def pairs_of(config: Any, count: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures and texts as a model takes them: uint8 pixels, and token ids that end as its texts do."""
    drawn = torch.Generator().manual_seed(0)
    side, text = config.vision_config.image_size, config.text_config
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=drawn)
    # SigLIP's default configuration has another tokenizer's end, beyond its own vocabulary.
    end = min(text.vocab_size - 1, text.eos_token_id)
    ids = torch.randint(3, end, (count, tokens), generator=drawn)
    ids[:, -1] = end
    return pixels, ids


def towers_of(config: Any, device: torch.device, tune: str = "full") -> Any:
    """A dual encoder with random weights, as train-retrieval has it before its first step."""
    from vlkit.config.training import TrainRetrievalConfig
    from vlkit.data.images.spec import PixelSpec
    from vlkit.models import tuning
    from vlkit.models.dual_encoder import DualEncoder
    from vlkit.models.families import dual_family
    from vlkit.models.hub import quiet_transformers

    with device:
        model = getattr(quiet_transformers(), dual_family(config.model_type).model_class)(config)
    # No text is cut into tokens here, so none of its tokenizers is needed.
    encoder = DualEncoder(model, None, PixelSpec(config.vision_config.image_size), config.model_type).to(device)
    tuning.apply_tuning(encoder, TrainRetrievalConfig(data=".", tune=tune), seed=0)
    tuning.train_mode(encoder)
    return encoder


def batch_of(images: Any, captions: torch.Tensor) -> Any:
    """Pairs as train-retrieval contrasts them, every one of them alone in its group."""
    from vlkit.data.labels import Labels
    from vlkit.data.loading.retrieval_batches import Batch

    names = [str(number) for number in range(len(captions))]
    labels = Labels.from_groups(names, names, "multi-positive")
    return Batch(images, captions, len(names), torch.arange(len(names)), labels, names)


def trainer_of(encoder: Any, batches: Any, precision: str, *, micro: int | None = None, lr: float = 1e-5) -> Any:
    """The loop of train-retrieval over these batches, without end."""
    from vlkit.models import tuning
    from vlkit.training.gradient_cache import ContrastiveLoss
    from vlkit.training.loop import steps
    from vlkit.training.optimizer import adamw, new_scaler

    optimizer = adamw(tuning.trainable(encoder), lr=lr, weight_decay=0.01)
    scaler = new_scaler(encoder.device, precision)
    contrast = ContrastiveLoss(encoder, encoder.family.loss, micro)
    return steps(batches, contrast, len, optimizer, total=10**9, precision=precision, scaler=scaler)


def tiny(kind: str) -> Any:
    """The configuration of tiny-clip or tiny-siglip, as they are before they have seen any text."""
    from vlkit.models.tiny import tiny_config

    config = tiny_config(f"tiny-{kind}")
    config.text_config.eos_token_id = config.text_config.vocab_size - 1
    config.text_config.projection_size = config.vision_config.hidden_size
    return config


def fp32_is_the_cpus(device: Device, precision: str) -> Found:
    """A loss without rounding to 16 bits: on the device as on the CPU."""
    from vlkit.training.gradient_cache import ContrastiveLoss

    apart = 0.0
    for kind in ("clip", "siglip"):
        torch.manual_seed(0)
        encoder = towers_of(tiny(kind), torch.device("cpu"))
        batch = batch_of(*pairs_of(encoder.model.config, PAIRS, 12 if kind == "clip" else SIDE))
        with torch.no_grad():
            here = ContrastiveLoss(encoder, encoder.family.loss)(batch).item()
            there = ContrastiveLoss(encoder.to(device.torch), encoder.family.loss)(batch).item()
        apart = max(apart, abs(here - there) / abs(here))
    return Found(apart <= FP32_WITHIN, f"relative difference {apart:.1e}, at most {FP32_WITHIN}")


def _count(device: Device, steps: int) -> int:
    # A CPU without such instructions takes its time over 16 bits.
    return steps if device.is_cuda else 5


def _trained(device: Device, precision: str, count: int) -> list[Any]:
    torch.manual_seed(0)
    encoder = towers_of(tiny("clip"), device.torch)
    batch = batch_of(*pairs_of(encoder.model.config, PAIRS, 12))
    trainer = trainer_of(encoder, cycle([batch]), precision, lr=1e-3)
    return [next(trainer) for _ in range(count)]


def bf16_learns(device: Device, precision: str) -> Found:
    """Steps on the same pairs."""
    steps = _trained(device, "bf16", _count(device, 30))
    first, last = steps[0].loss, steps[-1].loss
    return Found(last < 0.8 * first, f"loss {first:.3f} -> {last:.3f} in {len(steps)} steps")


def fp16_is_scaled(device: Device, precision: str) -> Found:
    """Steps under a loss scale; the first ones may overflow, and are left out."""
    steps = _trained(device, "fp16", _count(device, 20))
    taken = [step for step in steps if not step.skipped]
    told = f"{len(taken)} of {len(steps)} steps taken, loss {steps[0].loss:.3f} -> {steps[-1].loss:.3f}"
    return Found(2 * len(taken) > len(steps) and taken[-1].loss < taken[0].loss, told)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def attention_is_fused(device: Device, precision: str) -> Found:
    """Every encoder layer takes a fused kernel, but for a last one that is asked for one position alone."""
    from vlkit.models.device import autocast

    # In 16 bits a CPU is faster without.
    how = precision if device.is_cuda else "fp32"
    names: Counter[str] = Counter()
    wanted = 0
    for kind in ("clip", "siglip"):
        config = tiny(kind)
        encoder = towers_of(config, device.torch)
        pixels, ids = pairs_of(config, PAIRS, 12 if kind == "clip" else SIDE)
        for embed, inputs in ((encoder.embed_images, pixels), (encoder.embed_texts, ids)):
            with autocast(device.torch, how), _Counted() as counted:
                embed(inputs)
            names.update({name: n for name, n in counted.seen.items() if name.startswith("_scaled_dot_product")})
        wanted += config.vision_config.num_hidden_layers + config.text_config.num_hidden_layers
    # CLIP pools one position of either tower, SigLIP of the text's; its pictures' head is an attention of its own.
    wanted -= 3
    kernels = ", ".join(sorted(name.strip("_") for name in names)) or "none"
    return Found(names.total() >= wanted, f"{names.total()} calls, at least {wanted} wanted: {kernels}")


def nf4_captions(device: Device, precision: str) -> Found:
    """A tiny Qwen2 in 4 bits, a fusion in front of it that is trained to caption."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        return Found(None, "bitsandbytes is not installed")
    from vlkit.data.loading.caption_batches import CaptionBatch, pad_captions
    from vlkit.training.caption_loss import CaptionLoss
    from vlkit.training.loop import steps
    from vlkit.training.optimizer import adamw, new_scaler

    captioner, told = _captioner(device, precision)
    tokens = captioner.language.captions(told, 32)[0]
    captions, lengths = pad_captions(tokens, captioner.language.pad_id)
    pictures = pairs_of(tiny("siglip"), len(told), 4)[0]
    names = [str(number) for number in range(len(told))]
    batch = CaptionBatch(pictures, torch.arange(len(told)), captions, lengths, sum(map(len, tokens)), names)
    loss, trained = CaptionLoss(captioner, 0.1, None), captioner.trainable()
    how = {"precision": precision, "scaler": new_scaler(device.torch, precision)}
    optimizer = adamw(trained, lr=1e-3, weight_decay=0.0)
    taken = list(steps(cycle([batch]), loss, len, optimizer, total=_count(device, 15), **how))
    first, last = taken[0].loss, taken[-1].loss
    return Found(last < first, f"loss {first:.3f} -> {last:.3f} in {len(taken)} steps, {precision}")


def _captioner(device: Device, precision: str) -> tuple[Any, list[str]]:
    from vlkit.data.images.spec import PixelSpec
    from vlkit.models.captioner.captioner import Captioner
    from vlkit.models.captioner.language_model import load_llm
    from vlkit.models.captioner.tiny_llm import write_fresh_llm
    from vlkit.models.captioner.vision_encoder import VisionEncoder
    from vlkit.models.families import SIGLIP

    told = [f"a {size} {colour} tart" for size in ("small", "large") for colour in ("red", "green", "blue", "white")]
    with tempfile.TemporaryDirectory() as folder:
        write_fresh_llm([*told, "Say what you see."], Path(folder), seed=0)
        language = load_llm(folder, quantize="nf4", precision=precision)  # type: ignore[arg-type]
    vision = towers_of(tiny("siglip"), device.torch).model.vision_model
    encoder = VisionEncoder(vision, SIGLIP, PixelSpec(vision.config.image_size), "tiny").to(device.torch)
    captioner = Captioner.fresh(encoder, language, "Say what you see.", precision, seed=0)  # type: ignore[arg-type]
    return captioner.to(device.torch), told


CHECKS: dict[str, Callable[[Device, str], Found]] = {
    "fp32 loss, without TF32, is the CPU's": fp32_is_the_cpus,
    "bf16 training lowers the loss": bf16_learns,
    "fp16 training under a loss scale": fp16_is_scaled,
    "attention is a fused kernel": attention_is_fused,
    "nf4 language model, caption training": nf4_captions,
}


def said(error: BaseException) -> str:
    """An error in one line."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first[:120]}"


def run(device: Device, precision: str, found: list[tuple[bool | None, str]]) -> None:
    """Every check: whether it passed, and a line that says so. One that breaks has failed, and the others go on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, check in CHECKS.items():
        try:
            passed, told = check(device, precision)
        except Exception as error:
            traceback.print_exc()
            passed, told = False, said(error)
        word = {True: "PASS", False: "FAIL", None: "SKIP"}[passed]
        found.append((passed, f"{word}  {name}: {told}"))
