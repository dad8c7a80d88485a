"""A base in 4 bits: what it computes, and that gradients survive an evaluation."""

import pytest
import torch

from vlkit.config.training import TrainRetrievalConfig
from vlkit.models import loading, tuning
from vlkit.models.quantization import parameter_count

LORA = TrainRetrievalConfig(tune="lora", quantize="nf4", lora_dropout=0.0)


@pytest.fixture
def quantized(tiny_folder):
    return lambda name, precision="fp32": loading.load_dual_encoder(str(tiny_folder(name)), quantized=precision)


def inputs(created):
    pixels = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, created.pad(created.tokenize(["red tart", "soup", "blue pie", "bread"])[0])


def four_bit(created):
    return {name: m for name, m in created.model.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_it_computes_what_its_rounded_weights_say(name, quantized, tiny):
    """Against a plain model whose matrices are the dequantised ones; only encoder layers are rounded."""
    from bitsandbytes.functional import dequantize_4bit

    created, plain = quantized(name), tiny(name)
    packed = four_bit(created)
    layers = sum(c.num_hidden_layers for c in (plain.model.config.vision_config, plain.model.config.text_config))
    assert len(packed) == layers * 6 and all(".encoder.layers." in item for item in packed)
    pixels, ids = inputs(created)
    with torch.no_grad():
        whole = plain.embed_images(pixels)
        for item, module in packed.items():
            plain.model.get_submodule(item).weight.copy_(dequantize_4bit(module.weight, module.weight.quant_state))
        assert torch.allclose(created.embed_images(pixels), plain.embed_images(pixels), atol=1e-5)
        assert torch.allclose(created.embed_texts(ids), plain.embed_texts(ids), atol=1e-5)
        assert not torch.allclose(whole, plain.embed_images(pixels), atol=1e-4)
    contents = sum(p.numel() * p.element_size() for m in packed.values() for p in [m.weight])
    assert contents * 8 == sum(parameter_count(m.weight) for m in packed.values()) * 4
    assert tuning.count_parameters(created).total == tuning.count_parameters(plain).total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_changes_no_gradient(precision, quantized):
    """Train, evaluate, train: the gradients are those of a model that was never evaluated, and none is missing."""
    from vlkit.data.labels import label_matrix
    from vlkit.models.device import autocast
    from vlkit.training.losses import sigmoid_loss

    def gradients(evaluate):
        created = quantized("tiny-siglip", precision)
        tuning.apply_tuning(created, LORA, seed=0)
        with torch.no_grad():
            for parameter in tuning.trainable(created).values():
                parameter.add_(0.01)
        pixels, ids = inputs(created)
        if evaluate:
            created.eval()
            with torch.inference_mode(), autocast(created.device, precision):
                created.embed_images(pixels), created.embed_texts(ids)
        tuning.train_mode(created)
        with autocast(created.device, precision):
            images, texts = created.embed_images(pixels), created.embed_texts(ids)
        sigmoid_loss(created.logits(images, texts), label_matrix("abcd", "abcd")).backward()
        return {name: p.grad for name, p in tuning.trainable(created).items()}

    before, after = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for name, g in before.items() if "k_proj" not in name)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_matrices_are_multiplied_in_the_precision_of_the_run(quantized):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert {module.compute_dtype for module in four_bit(quantized("tiny-clip", precision)).values()} == {dtype}
