"""VLKIT_FAST=off gives plain transformers, and every fast way computes the same."""

from __future__ import annotations

import ctypes

import pytest
import torch

from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import UsageError
from vlkit.models import fast, loading, tuning
from vlkit.models.device import autocast
from vlkit.models.fast import linear, memory

TEXTS = ["red tart", "soup", "a very blue pie", "", "bread"]
# How far a fast way may be from plain transformers, relative to the norm: float32 rounds at 6e-8; two ways through bf16
# (4e-3) round different intermediate results. Gradients go through twice as many products.
EMBEDDINGS = {"fp32": 1e-6, "bf16": 2e-2}
GRADIENTS = {"fp32": 1e-5, "bf16": 1e-1}


def both_towers(folder, precision, tune="full"):
    """Embeddings of images and texts, and the gradients of a function of both, as the switch is now."""
    encoder = loading.load_dual_encoder(str(folder))
    tuning.apply_tuning(encoder, TrainRetrievalConfig(tune=tune, lora_dropout=0), seed=0)
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    pixels = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with autocast(torch.device("cpu"), precision):
        actual = [encoder.embed_images(pixels), encoder.embed_texts(encoder.pad(encoder.tokenize(TEXTS)[0]))]
    weight = torch.linspace(-1, 1, 5 * encoder.width).view(5, -1)
    sum((embeddings * weight).sum() for embeddings in actual).backward()
    gradients = {name: p.grad for name, p in tuning.trainable(encoder).items() if p.grad is not None}
    return encoder, [embeddings.detach() for embeddings in actual], gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_embeddings_and_gradients_are_those_of_plain_transformers(name, tune, precision, tiny_folder, monkeypatch):
    monkeypatch.setattr(linear, "SMALL_WEIGHT", 1)  # So that oneDNN multiplies a tiny model's weights, too.
    actual = {}
    for switch in ("on", "off"):
        monkeypatch.setenv("VLKIT_FAST", switch)
        actual[switch] = both_towers(tiny_folder(name), precision, tune)
    _, embeddings, gradients = actual["on"]
    _, plain_embeddings, plain_gradients = actual["off"]
    for ours, theirs in zip(embeddings, plain_embeddings, strict=True):
        assert (ours - theirs).norm() <= EMBEDDINGS[precision] * theirs.norm()
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 20
    ours, theirs = (torch.cat([item[key].flatten() for key in sorted(item)]) for item in (gradients, plain_gradients))
    assert (ours - theirs).norm() <= GRADIENTS[precision] * theirs.norm()


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_off_leaves_every_module_as_transformers_made_it(name, tiny_folder, monkeypatch):
    ours = "vlkit.models.fast"
    classes = {}
    for switch in ("on", "off"):
        monkeypatch.setenv("VLKIT_FAST", switch)
        encoder = loading.load_dual_encoder(str(tiny_folder(name)))
        classes[switch] = {type(module).__module__ for module in encoder.model.modules()}
        attention = encoder.model.vision_model.encoder.layers[0].self_attn.config._attn_implementation
        assert attention == ("vlkit" if switch == "on" else "sdpa")
    assert any(module.startswith(ours) for module in classes["on"])
    assert not any(module.startswith(ours) for module in classes["off"])


def test_off_switches_products_and_the_allocator_off(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: calls.append(1) or (_ for _ in ()).throw(OSError))
    monkeypatch.setenv("VLKIT_FAST", "off")
    assert not fast.enabled() and not linear.onednn()
    memory._set_malloc_options.cache_clear()
    memory.keep_freed_memory()
    assert not calls


@pytest.mark.parametrize("value", ["of", "0", "false"])
def test_another_value_is_refused(value, monkeypatch):
    monkeypatch.setenv("VLKIT_FAST", value)
    with pytest.raises(UsageError, match="VLKIT_FAST"):
        fast.enabled()
