"""The dual encoders: real configurations on the meta device, save_pretrained folders, transformers as the reference."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.data.images.decode import load_pixels
from vlkit.data.images.spec import PixelSpec
from vlkit.data.labels import label_matrix
from vlkit.errors import ArtifactError, NetworkError, UsageError
from vlkit.models import loading
from vlkit.models.device import autocast
from vlkit.models.preprocessing import with_decode
from vlkit.remote import file_sha256
from vlkit.training.losses import sigmoid_loss, softmax_loss

TEXTS = ["a red tart", "a green soup", "a red tart", "a blue pie with a long name", "a red tart"]


def test_real_configurations_have_the_published_shapes():
    from transformers import CLIPConfig, SiglipConfig

    siglip, clip = loading.encoder_on_meta(SiglipConfig()), loading.encoder_on_meta(CLIPConfig())
    shapes = {
        family: {name: tuple(p.shape) for name, p in of.model.named_parameters()}
        for family, of in (("siglip", siglip), ("clip", clip))
    }
    assert sum(p.numel() for p in siglip.parameters()) == 203_155_970
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313
    for layer in range(12):
        for tower, width in (("vision_model", 768), ("text_model", 512)):
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                name = f"{tower}.encoder.layers.{layer}.self_attn.{projection}.weight"
                assert shapes["siglip"][name] == (768, 768)
                assert shapes["clip"][name] == (width, width)
    assert shapes["siglip"]["vision_model.embeddings.patch_embedding.weight"] == (768, 3, 16, 16)
    assert shapes["siglip"]["vision_model.head.attention.in_proj_weight"] == (2304, 768)
    assert shapes["siglip"]["text_model.head.weight"] == (768, 768)
    assert shapes["clip"]["vision_model.embeddings.patch_embedding.weight"] == (768, 3, 32, 32)
    assert shapes["clip"]["visual_projection.weight"] == (512, 768)
    assert set(siglip.logit_parameters()) == {"logit_scale", "logit_bias"}
    assert set(clip.logit_parameters()) == {"logit_scale"}
    assert (siglip.text_limit, clip.text_limit) == (64, 77)
    assert (siglip.pixel_spec.size, clip.pixel_spec.size) == (224, 224)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_a_save_pretrained_folder_gives_transformers_own_logits(name, tiny, tiny_folder, tmp_path):
    """Same folder, same picture, same texts: AutoModel with AutoProcessor's parts, and Towers."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder, encoder = tiny_folder(name), with_decode(tiny(name), "exact")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    image = AutoImageProcessor.from_pretrained(folder, use_fast=False)(
        Image.open(tmp_path / "p.png"), return_tensors="pt"
    )
    limit = encoder.text_limit
    text = tokenizer(TEXTS, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=text, pixel_values=image["pixel_values"]).logits_per_image
        ours = encoder.logits(
            encoder.embed_images(torch.from_numpy(load_pixels(tmp_path / "p.png", encoder.pixel_spec))[None]),
            encoder.embed_texts(encoder.pad(encoder.tokenize(TEXTS)[0])),
        )
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 130), (131, 77), (64, 64), (40, 41), (300, 217)])
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_pixels_equal_transformers_image_processors(family, size, tmp_path):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    if family == "siglip":
        spec, processor = PixelSpec(64), SiglipImageProcessorPil(size={"height": 64, "width": 64})
    else:
        spec = PixelSpec(64, fit="crop", resize=64)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected = processor(Image.open(tmp_path / "p.png"), do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ][0]
    assert np.array_equal(load_pixels(tmp_path / "p.png", dataclasses.replace(spec, decode="exact")), expected)
    assert np.abs(load_pixels(tmp_path / "p.png", spec) - expected.astype(int)).max() <= 1  # By default nearly so.


def test_siglip_is_padded_to_its_limit_and_clip_to_the_longest(tiny):
    siglip, clip = tiny("tiny-siglip"), tiny("tiny-clip")
    assert siglip.pad(siglip.tokenize(TEXTS)[0]).shape == (5, 64)
    longest = max(map(len, clip.tokenize(TEXTS)[0]))
    assert clip.pad(clip.tokenize(TEXTS)[0]).shape == (5, longest)
    assert longest < 77


def test_trimmed_clip_texts_are_exact(tiny):
    clip = tiny("tiny-clip")
    ids = clip.tokenize(TEXTS)[0]
    full = torch.full((5, 77), clip.tokenizer.pad_token_id)
    for row, tokens in enumerate(ids):
        full[row, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        assert torch.allclose(clip.embed_texts(clip.pad(ids)), clip.embed_texts(full), atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_cutting_keeps_the_end_and_equals_transformers(name, tiny):
    encoder = tiny(name)
    text = "red soup " * 60
    ids, cut = encoder.tokenize([text, "red"])
    assert cut == 1
    assert ids[0] == encoder.tokenizer(text, truncation=True, max_length=encoder.text_limit)["input_ids"]
    assert ids[0][-1] == ids[1][-1] == encoder.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_gradients_of_unique_captions_equal_the_plain_way(name, tiny):
    """Encoding each caption once and gathering, against encoding every row at full length."""
    encoder = tiny(name)
    loss = sigmoid_loss if name == "tiny-siglip" else softmax_loss
    images = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = label_matrix(TEXTS, TEXTS, "multi-positive")
    unique = list(dict.fromkeys(TEXTS))
    index = torch.tensor([unique.index(text) for text in TEXTS])

    def gradients(texts):
        encoder.zero_grad()
        value = loss(encoder.logits(encoder.embed_images(images), texts()), labels)
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in encoder.model.parameters() if p.grad is not None])

    def plain():
        ids = encoder.tokenizer(TEXTS, padding="max_length", max_length=encoder.text_limit, return_tensors="pt")[
            "input_ids"
        ]
        return encoder.embed_texts(ids)

    expected, whole = gradients(plain)
    value, actual = gradients(lambda: encoder.embed_texts(encoder.pad(encoder.tokenize(unique)[0]))[index])
    assert value == pytest.approx(expected, rel=1e-6)
    assert (actual - whole).norm() <= 1e-6 * whole.norm()


def test_logits_are_float32_under_autocast(tiny):
    """bf16 logits at scale 117 are off by up to 0.12; these must equal float64's to rounding."""
    encoder = tiny("tiny-siglip")
    with torch.no_grad():
        encoder.model.logit_scale.fill_(np.log(117))
    a, b = (torch.nn.functional.normalize(torch.randn(20, 96), dim=1) for _ in range(2))
    with autocast(torch.device("cpu"), "bf16"):
        actual = encoder.logits(a, b)
    expected = 117 * a.double() @ b.double().T - 10
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-4


def test_the_scale_of_clip_is_clamped_and_siglips_is_not(tiny):
    for name, expected in (("tiny-clip", 100.0), ("tiny-siglip", 112.3)):
        encoder = tiny(name)
        with torch.no_grad():
            encoder.model.logit_scale.fill_(np.log(112.3))
        encoder.clamp_logit_scale()
        assert encoder.model.logit_scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_tiny_models_are_functions_of_texts_and_seed(tmp_path):
    from vlkit.models.tiny import write_tiny

    for name in ("tiny-siglip", "tiny-clip"):
        for copy, seed in (("a", 1), ("b", 1), ("c", 2)):
            write_tiny(name, ["a red tart", "a soup"], tmp_path / name / copy, seed=seed)
        a, b, c = ({p.name: file_sha256(p) for p in (tmp_path / name / copy).iterdir()} for copy in "abc")
        assert a == b
        assert a["model.safetensors"] != c["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tiny-siglop", UsageError, "tiny-siglip"),
        ("no/such/folder", UsageError, "hub name"),
        ("google/siglip-base-patch16-224", NetworkError, "local folder"),
    ],
)
def test_unknown_models_are_refused(name, error, message):
    with pytest.raises(error) as refused:
        loading.load_dual_encoder(name)
    assert message in refused.value.hint


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError, match="is a bert model"):
        loading.load_dual_encoder(str(tmp_path))


def test_damaged_weights_are_refused(tiny_folder, tmp_path):
    for file in tiny_folder("tiny-siglip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        loading.load_dual_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("hub", "name"), [("google/siglip-base-patch16-224", "tiny-siglip"), ("openai/clip-vit-base-patch32", "tiny-clip")]
)
def test_a_hub_name_loads_from_the_cache_by_the_same_code(hub, name, tiny, tiny_folder, tmp_path):
    """The hub's cache as huggingface_hub lays it out, under the published name; weights tiny, files in their format."""
    program = f"""
from vlkit.models.loading import load_dual_encoder
encoder = load_dual_encoder({hub!r})
print(sum(p.numel() for p in encoder.parameters()), type(encoder.tokenizer).__name__, encoder.pixel_spec.fit)
"""
    cache = tmp_path / "hub" / f"models--{hub.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_folder(name), cache / "snapshots" / ("0" * 40))
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = tiny(name)
    assert out == [
        str(sum(p.numel() for p in expected.parameters())),
        type(expected.tokenizer).__name__,
        expected.pixel_spec.fit,
    ]


def test_preprocessing_is_read_from_either_file_and_guessed_from_neither(tiny_folder, tmp_path):
    from transformers import CLIPImageProcessorPil

    shutil.copytree(tiny_folder("tiny-clip"), tmp_path / "m")
    expected = loading.load_dual_encoder(str(tmp_path / "m")).pixel_spec
    settings = json.loads((tmp_path / "m/preprocessor_config.json").read_text())
    (tmp_path / "m/preprocessor_config.json").unlink()
    (tmp_path / "m/processor_config.json").write_text(
        json.dumps({"image_processor": settings, "processor_class": "CLIPProcessor"})
    )
    assert loading.load_dual_encoder(str(tmp_path / "m")).pixel_spec == expected
    (tmp_path / "m/processor_config.json").unlink()
    published = CLIPImageProcessorPil()
    guessed = loading.load_dual_encoder(str(tmp_path / "m")).pixel_spec
    assert (list(guessed.mean), list(guessed.std)) == (list(published.image_mean), list(published.image_std))
    # openai/clip-vit-base-patch32 writes plain numbers where newer folders have mappings.
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps({**settings, "size": 64, "crop_size": 64}))
    assert loading.load_dual_encoder(str(tmp_path / "m")).pixel_spec == expected
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps({**settings, "size": 224, "crop_size": 224}))
    with pytest.raises(ArtifactError, match="224 pixels"):
        loading.load_dual_encoder(str(tmp_path / "m"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_the_chain_of_stages_is_one_wherever_it_is_cut(name, precision, tiny):
    from vlkit.models.device import autocast
    from vlkit.models.stages import PartialForward, frozen_depth, run_stages

    encoder = tiny(name)
    load_pixels = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = encoder.pad(encoder.tokenize(["red tart", "soup", "a very blue pie", "", "bread"])[0])
    begun = {
        "pictures": (encoder.image_chain, PartialForward(encoder.normalize_pixels(load_pixels), 0)),
        "texts": (encoder.text_chain, PartialForward(ids, 0, encoder.pool_positions(ids))),
    }
    with torch.no_grad(), autocast(encoder.device, precision):
        for chain, whole in begun.values():
            at_once = run_stages(chain, whole).values
            for depth in range(len(chain) + 1):
                assert torch.equal(run_stages(chain, run_stages(chain, whole, depth)).values, at_once), depth
    assert frozen_depth(encoder.image_chain) == 0
    encoder.model.requires_grad_(False)
    assert frozen_depth(encoder.image_chain) == len(encoder.image_chain)


def test_an_old_clip_configuration_pools_at_the_highest_token(tiny):
    """Configurations from before the end's number was right say 2; transformers then takes the largest id."""
    encoder = tiny("tiny-clip")
    ids = encoder.pad(encoder.tokenize(["red tart", "a soup that is blue"])[0])
    with torch.no_grad():
        encoder.model.config.text_config.eos_token_id = encoder.model.text_model.eos_token_id = 2
        theirs = encoder.model.get_text_features(input_ids=ids).pooler_output
        assert torch.allclose(encoder.embed_texts(ids), torch.nn.functional.normalize(theirs, dim=1), atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_a_configuration_that_names_its_attention_changes_no_number(name, attention, tiny, tiny_folder, tmp_path):
    """Eager attention knows no flag for causal texts, it needs the mask."""
    import transformers

    folder = shutil.copytree(tiny_folder(name), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"attn_implementation": attention} if attention else {})))
    model = loading.load_dual_encoder(str(folder))
    if attention == "eager":
        assert model.model.config.text_config._attn_implementation == "eager"
    theirs = transformers.AutoModel.from_pretrained(tiny_folder(name))
    ids = model.pad(model.tokenize(TEXTS)[0])
    side = model.pixel_spec.size
    pictures = torch.randint(0, 255, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        texts = theirs.get_text_features(input_ids=ids).pooler_output
        images = theirs.get_image_features(pixel_values=model.normalize_pixels(pictures)).pooler_output
        assert torch.allclose(model.embed_texts(ids), torch.nn.functional.normalize(texts, dim=-1), atol=1e-6)
        assert torch.allclose(model.embed_images(pictures), torch.nn.functional.normalize(images, dim=-1), atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_nothing_is_embedded_as_no_rows(name, tiny):
    model = tiny(name)
    side = model.pixel_spec.size
    assert model.embed_texts(model.pad([])).shape == (0, model.width)
    assert model.embed_images(torch.zeros(0, 3, side, side, dtype=torch.uint8)).shape == (0, model.width)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_a_copy_computes_with_its_own_weights(name, tiny):
    model = tiny(name)
    ids = model.pad(model.tokenize(TEXTS)[0])
    with torch.no_grad():
        before = model.embed_texts(ids)
        copied = deepcopy(model)
        for parameter in copied.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
        assert torch.equal(model.embed_texts(ids), before)
        assert not torch.allclose(copied.embed_texts(ids), before, atol=1e-2)
