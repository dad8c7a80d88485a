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


def inputs(made):
    pixels = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, made.pad(made.tokenize(["red tart", "soup", "blue pie", "bread"])[0])


def four_bit(made):
    return {name: m for name, m in made.model.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_it_computes_what_its_rounded_weights_say(name, quantized, tiny):
    """Against a plain model whose matrices are the dequantised ones; only encoder layers are rounded."""
    from bitsandbytes.functional import dequantize_4bit

    made, plain = quantized(name), tiny(name)
    packed = four_bit(made)
    layers = sum(c.num_hidden_layers for c in (plain.model.config.vision_config, plain.model.config.text_config))
    assert len(packed) == layers * 6 and all(".encoder.layers." in each for each in packed)
    pixels, ids = inputs(made)
    with torch.no_grad():
        whole = plain.embed_images(pixels)
        for each, module in packed.items():
            plain.model.get_submodule(each).weight.copy_(dequantize_4bit(module.weight, module.weight.quant_state))
        assert torch.allclose(made.embed_images(pixels), plain.embed_images(pixels), atol=1e-5)
        assert torch.allclose(made.embed_texts(ids), plain.embed_texts(ids), atol=1e-5)
        assert not torch.allclose(whole, plain.embed_images(pixels), atol=1e-4)
    held = sum(p.numel() * p.element_size() for m in packed.values() for p in [m.weight])
    assert held * 8 == sum(parameter_count(m.weight) for m in packed.values()) * 4
    assert tuning.count_parameters(made).total == tuning.count_parameters(plain).total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_changes_no_gradient(precision, quantized):
    """Train, evaluate, train: the gradients are those of a model that was never evaluated, and none is missing."""
    from vlkit.data.labels import label_matrix
    from vlkit.models.device import autocast
    from vlkit.training.losses import sigmoid_loss

    def gradients(evaluate):
        made = quantized("tiny-siglip", precision)
        tuning.apply_tuning(made, LORA, seed=0)
        with torch.no_grad():
            for parameter in tuning.trainable(made).values():
                parameter.add_(0.01)
        pixels, ids = inputs(made)
        if evaluate:
            made.eval()
            with torch.inference_mode(), autocast(made.device, precision):
                made.embed_images(pixels), made.embed_texts(ids)
        tuning.train_mode(made)
        with autocast(made.device, precision):
            images, texts = made.embed_images(pixels), made.embed_texts(ids)
        sigmoid_loss(made.logits(images, texts), label_matrix("abcd", "abcd")).backward()
        return {name: p.grad for name, p in tuning.trainable(made).items()}

    before, after = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for name, g in before.items() if "k_proj" not in name)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_matrices_are_multiplied_in_the_precision_of_the_run(quantized):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert {module.compute_dtype for module in four_bit(quantized("tiny-clip", precision)).values()} == {dtype}
