"""The shorter ways through transformers' layers, beside transformers' own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.models.device import autocast
from vlkit.models.fast import layers
from vlkit.models.loading import load_dual_encoder

TEXTS = ["red tart", "soup", "a very blue pie", "", "bread"]
CLASSES = {"tiny-clip": "CLIPModel", "tiny-siglip": "SiglipModel"}


def quickened(**parts):
    """A module with these children, after `use_fast_layers`."""
    module = torch.nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    layers.use_fast_layers(module)
    return module


def inputs(encoder):
    pixels = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, encoder.pad(encoder.tokenize(TEXTS)[0])


def both_losses(encoder, theirs, precision):
    """The same function of all embeddings, by vlkit's chain and by transformers' own forward; and the embeddings."""
    pixels, ids = inputs(encoder)
    with autocast(torch.device("cpu"), precision):
        ours = [encoder.embed_images(pixels), encoder.embed_texts(ids)]
        others = [
            theirs.get_image_features(pixel_values=encoder.normalize_pixels(pixels)).pooler_output,
            theirs.get_text_features(input_ids=ids).pooler_output,
        ]
    others = [F.normalize(item.float(), dim=-1) for item in others]
    weight = torch.linspace(-1, 1, 5 * encoder.width).view(5, -1)
    return [sum((item * weight).sum() for item in part) for part in (ours, others)], ours, others


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_and_gradients_are_those_of_transformers(name, tiny_folder):
    import transformers

    encoder = load_dual_encoder(str(tiny_folder(name)))
    theirs = getattr(transformers, CLASSES[name]).from_pretrained(tiny_folder(name))
    losses, ours, others = both_losses(encoder, theirs, "fp32")
    for one, other in zip(ours, others, strict=True):
        assert (one - other).abs().max() < 1e-6
    for loss in losses:
        loss.backward()
    expected = dict(theirs.named_parameters())
    reached = 0
    for parameter_name, parameter in encoder.model.named_parameters():
        other = expected[parameter_name].grad
        if other is None:
            assert parameter.grad is None, parameter_name
            continue
        reached += 1
        assert (parameter.grad - other).abs().max() <= 2e-6 + 1e-5 * other.abs().max(), parameter_name
    assert reached > 60


@pytest.mark.parametrize("name", CLASSES)
def test_16_bits_err_no_more_than_transformers_does(name, tiny_folder):
    import transformers

    encoder = load_dual_encoder(str(tiny_folder(name)))
    theirs = getattr(transformers, CLASSES[name]).from_pretrained(tiny_folder(name))
    with torch.no_grad():
        _, _, exact = both_losses(encoder, theirs, "fp32")
        _, ours, others = both_losses(encoder, theirs, "bf16")
    for truth, one, other in zip(exact, ours, others, strict=True):
        assert (one - truth).norm() < 1.5 * (other - truth).norm()


@pytest.mark.parametrize("name", CLASSES)
def test_the_16_bit_gradient_errs_no_more_than_transformers_does(name, tiny_folder):
    import transformers

    errors = []
    for way in (0, 1):
        actual = {}
        for precision in ("fp32", "bf16"):
            encoder = load_dual_encoder(str(tiny_folder(name)))
            theirs = getattr(transformers, CLASSES[name]).from_pretrained(tiny_folder(name))
            losses, _, _ = both_losses(encoder, theirs, precision)
            losses[way].backward()
            model = (encoder.model, theirs)[way]
            actual[precision] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        errors.append((actual["bf16"] - actual["fp32"]).norm() / actual["fp32"].norm())
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.1


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_attention_in_16_bits_errs_no_more_than_transformers_eager_one_does(scale):
    from transformers.models.clip.modeling_clip import eager_attention_forward

    query, key, value = torch.randn(3, 4, 3, 50, 32, generator=torch.Generator().manual_seed(0))
    query, key, value = (query * scale).bfloat16(), (key * scale).bfloat16(), value.bfloat16()
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float()).transpose(1, 2)
    scores = (query.float() @ key.float().transpose(2, 3)) * 32**-0.5
    assert scores.abs().max() > (100 if scale > 1 else 3)
    ours, _ = layers.attention(torch.nn.Module().eval(), query, key, value, None, scaling=32**-0.5)
    theirs, _ = eager_attention_forward(torch.nn.Module().eval(), query, key, value, None, scaling=32**-0.5)
    assert (ours.float() - exact).norm() < 1.1 * (theirs.float() - exact).norm()


@pytest.mark.parametrize("name", CLASSES)
def test_names_shapes_and_what_is_saved_stay_as_they_are(name, tiny_folder, tmp_path):
    import transformers

    encoder = load_dual_encoder(str(tiny_folder(name)))
    theirs = getattr(transformers, CLASSES[name]).from_pretrained(tiny_folder(name))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in encoder.model.state_dict().items()} == shapes
    encoder.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 9),
    width=st.integers(1, 5),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_by_products_is_attention(items, heads, length, width, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, items, heads, length, width, generator=generator, dtype=torch.float64)
    actual = layers._attend_by_products(query, key, value, 0.37, causal)
    expected = torch.empty_like(actual)
    for item in range(items):
        for head in range(heads):
            for place in range(length):
                observed = place + 1 if causal else length
                scores = 0.37 * (key[item, head, :observed] @ query[item, head, place])
                expected[item, head, place] = scores.softmax(0) @ value[item, head, :observed]
    assert torch.allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_in_16_bits_attention_takes_the_products_and_agrees_with_the_fused_kernel(causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 10, 8, generator=generator)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    narrow = [item.bfloat16() for item in (query, key, value)]
    fused = F.scaled_dot_product_attention(*narrow, is_causal=causal).float()
    module = torch.nn.Module()
    actual, _ = layers.attention(module, *narrow, None, scaling=8**-0.5, dropout=0.0, is_causal=causal)
    error = (actual.transpose(1, 2).float() - exact).norm() / exact.norm()
    assert error < max(2 * (fused - exact).norm() / exact.norm(), 0.01)


def test_a_mask_is_obeyed_in_16_bits():
    query, key, value = torch.randn(3, 2, 3, 10, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    mask[..., 0] = True
    actual, _ = layers.attention(torch.nn.Module(), query, key, value, mask, scaling=8**-0.5, is_causal=False)
    assert torch.allclose(actual, value[:, :, :1].transpose(1, 2).expand_as(actual))


def test_quick_gelu_is_its_formula_and_so_is_its_gradient():
    values = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
    actual = layers.QuickGELU()(values)
    assert torch.allclose(actual, values * torch.sigmoid(1.702 * values), atol=1e-12)
    assert torch.autograd.gradcheck(layers.QuickGELU(), values)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from([(2, 2), (3, 3), (2, 4)]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    rest=st.integers(0, 1),
    bias=st.booleans(),
)
def test_patches_are_a_convolution(kernel, rows, columns, rest, bias):
    convolution = torch.nn.Conv2d(3, 5, kernel, kernel, bias=bias).double()
    pixels = torch.randn(2, 3, rows * kernel[0] + rest, columns * kernel[1] + rest, dtype=torch.float64)
    expected, before = convolution(pixels), dict(convolution.named_parameters())
    quick = quickened(patch_embedding=convolution).patch_embedding
    assert type(quick) is layers.PatchProjection and all(p is before[n] for n, p in quick.named_parameters())
    assert torch.allclose(quick(pixels), expected, atol=1e-12)
    assert quick(pixels[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("flags", [{"groups": 3}, {"dilation": 2}, {"padding": 1}, {"stride": 1}])
def test_another_convolution_stays_one(flags):
    convolution = torch.nn.Conv2d(3, 6, 4, **{"stride": 4, **flags})
    assert type(quickened(patch_embedding=convolution).patch_embedding) is torch.nn.Conv2d


def test_hooks_stay_where_they_are():
    observed = []
    parts = {"layer_norm1": torch.nn.LayerNorm(4), "fc": torch.nn.Linear(4, 4)}
    for part in parts.values():
        part.register_forward_hook(lambda module, *_: observed.append(type(module)))
    quick = quickened(**parts)
    quick.fc(quick.layer_norm1(torch.zeros(2, 4)))
    assert observed == [layers.NarrowLayerNorm, layers.Linear]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_the_last_layer_for_one_position_is_the_layer_at_that_position(tower, lora, checkpointed, tiny_folder):
    from vlkit.config.training import TrainRetrievalConfig
    from vlkit.models import tuning

    encoder = load_dual_encoder(str(tiny_folder("tiny-clip")))
    config = TrainRetrievalConfig(tune="lora" if lora else "full", checkpoint_activations=checkpointed, lora_dropout=0)
    tuning.apply_tuning(encoder, config, seed=0)
    encoder.train()
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    layer = getattr(encoder.model, tower).encoder.layers[-1]
    assert layer.gradient_checkpointing == checkpointed
    width = layer.layer_norm1.normalized_shape[0]
    values = torch.randn(4, 7, width, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([0, 3, 6, 2]) if tower == "text_model" else 0
    results = []
    for pooled in (True, False):
        given_values = values.clone().requires_grad_()
        if pooled:
            actual = layers.pooled_layer(layer, given_values, ends)
        else:
            whole = layer(given_values, None, is_causal=tower == "text_model")
            actual = whole[torch.arange(4), ends]
        encoder.zero_grad()
        actual.square().sum().backward()
        trained = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        results.append((actual.detach(), given_values.grad, trained))
    (ours, our_input, our_grads), (theirs, their_input, their_grads) = results
    assert torch.allclose(ours, theirs, atol=1e-5) and torch.allclose(our_input, their_input, atol=1e-4)
    assert our_grads.keys() == their_grads.keys() and our_grads
    for name, gradient in their_grads.items():
        assert torch.allclose(our_grads[name], gradient, atol=1e-4, rtol=1e-4), name


FAULTS = """
import resource, torch
from vlkit.models.fast.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left_alone = faults()
keep_freed_memory()
faults()
faults()
print(left_alone, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_taken_again_without_a_page_fault():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    left_alone, remaining = map(int, done.stdout.split())
    assert left_alone > 500 and remaining < left_alone / 10
