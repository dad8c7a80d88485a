"""`import vlkit`: what it loads, what it offers, and that its numbers are the commands' and transformers'."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_patterned_image
from PIL import Image

import vlkit as face
from vlkit.errors import ArtifactError, DataError, UsageError

TEXTS = ["a red tart", "a green soup", "a blue pie with a long name"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.{suffix}" for number, suffix in enumerate(("png", "jpg", "png"))]
    for number, path in enumerate(paths):
        write_patterned_image(path, number)
    return paths


def in_another_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_it_imports_nothing_heavy():
    code = """
import sys, vlkit
heavy = ("torch", "transformers", "numpy", "pandas", "PIL", "faiss", "typer")
print([name for name in heavy if name in sys.modules], set(vlkit.__all__) <= set(dir(vlkit)))
"""
    assert in_another_process(code).split() == ["[]", "True"]


def test_every_name_exists_and_no_other():
    assert set(face.__all__) - {"__version__"} == set(face._SOURCES)
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        face.fine_tune  # noqa: B018
    assert face.label_matrix(["a", "b"], ["b", "b"], "multi-positive").tolist() == [[-1, -1], [1, 1]]


def test_the_types_ship():
    assert (ROOT / "vlkit/py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["vlkit"]


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_its_vectors_and_logits_are_transformers_own(name, tiny_folder, images):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = tiny_folder(name)
    encoder = face.load(folder, precision="fp32", decode="exact")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder, use_fast=False)(
        [Image.open(path) for path in images], return_tensors="pt"
    )
    limit = encoder.dual_encoder.text_limit
    tokens = tokenizer(TEXTS, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"])
    rows, texts = encoder.encode_images(images), encoder.encode_texts(TEXTS)
    for ours, theirs in ((rows, expected.image_embeds), (texts, expected.text_embeds)):
        assert ours.dtype == np.float32 and ours.shape == (3, encoder.width)
        assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
        assert np.allclose(ours, torch.nn.functional.normalize(theirs, dim=-1).numpy(), atol=1e-5)
    assert np.allclose(encoder.logits(rows, texts), expected.logits_per_image.numpy(), atol=1e-4)
    scaled = encoder.logit_scale * rows @ texts.T + (encoder.logit_bias or 0.0)
    assert np.allclose(scaled, expected.logits_per_image.numpy(), atol=1e-4)
    assert (encoder.logit_bias is None) == (name == "tiny-clip")


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_a_path_a_string_and_an_image_of_pillow_give_the_same_vector(decode, tiny_folder, images):
    encoder = face.load(str(tiny_folder("tiny-clip")), decode=decode)
    by_path, by_name = encoder.encode_images(images), encoder.encode_images([str(path) for path in images])
    opened = [Image.open(path) for path in images]
    assert np.array_equal(by_path, by_name)
    assert np.allclose(by_path, encoder.encode_images(opened), atol=1e-5)
    turned = Image.open(images[0]).rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    size = turned.size
    assert np.allclose(encoder.encode_images([turned])[0], by_path[0], atol=1e-5) and turned.size == size


def test_nothing_to_encode_is_no_rows(tiny_folder):
    encoder = face.load(tiny_folder("tiny-clip"))
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, encoder.width)
    assert f"width={encoder.width}" in repr(encoder)


def test_what_it_cannot_open_says_why(tiny_folder, tmp_path):
    with pytest.raises(UsageError):
        face.load(tmp_path / "nothing")
    encoder = face.load(tiny_folder("tiny-clip"))
    with pytest.raises(DataError, match=r"gone\.jpg: no such image") as gone:
        encoder.encode_images([tmp_path / "gone.jpg"])
    assert gone.value.hint is None
    for image in ("gone.jpg", tmp_path / "gone.jpg", Image.new("RGB", (8, 8))):
        with pytest.raises(UsageError, match="list of images"):
            encoder.encode_images(image)
    with pytest.raises(UsageError, match="only in the run that made it"):
        face.load("tiny-siglip")
    with pytest.raises(UsageError, match="list of texts"):
        encoder.encode_texts("a red tart")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("data: d\nllm: tiny-qwen\nvision: tiny-clip\n")
    with pytest.raises(UsageError, match="captioner"):
        face.load(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("data: d\nmodel: tiny-clip\n")
    with pytest.raises(ArtifactError, match="not finished") as unfinished:
        face.load(tmp_path / "run")
    assert f"vlkit train-retrieval --config {tmp_path / 'run/config.yaml'}" in unfinished.value.hint
