"""--text-model: a text encoder of any kind beside CLIP's or SigLIP's vision tower, trained and loaded again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlkit.errors import ArtifactError, UsageError
from vlkit.models import loading, paired_encoder

TEXTS = ["قورمه سبزی", "a red tart", "a soup that is blue, and a long one", "bread", "قورمه‌سبزی"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Fresh pairs by the name of their vision tower, made once."""
    created = {}

    def folder(vision):
        if vision not in created:
            created[vision] = tmp_path_factory.mktemp(vision) / "pair"
            loading.load_or_create(vision, TEXTS, seed=3, text_model="tiny-xlmr", keep_in=created[vision])
        return created[vision]

    return folder


@pytest.mark.parametrize("tune", ["full", "text", "head", "lora", "last"])
def test_every_way_of_tuning_trains_saves_and_opens_again(tune, prepared, vlkit, tmp_path):
    """The run's model gives the same validation as the run said; the vision tower of --tune text is bit-equal."""
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--text-model", "tiny-xlmr")
    more = ("--unfreeze-layers", 1) if tune == "last" else ()
    flags = ("--runs-dir", tmp_path, "--name", tune, "--steps", 3, "--batch-size", 16, "--tune", tune, "--lr", 1e-2)
    outcome = vlkit(*base, *flags, *more, "--json")
    assert outcome.code == 0, outcome.err
    run = tmp_path / tune
    measured = vlkit("eval", "--run", run, "--split", "val", "--json")
    assert measured.code == 0, measured.err
    direction = measured.json()["metrics"]["text_to_image"]
    assert direction["mrr"] == pytest.approx(outcome.json()["validation"]["text_to_image"]["mrr"])
    before = loading.load_dual_encoder(str(run / "base")).model.state_dict()
    after = loading.load_model(str(run)).model
    after = after.state_dict()
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert "text_projection.weight" in moved
    if tune == "text":
        assert not [name for name in moved if name.startswith(("vision", "visual"))]
        assert [name for name in moved if "text_model.encoder.layer.0" in name]
        assert "cache of images" in outcome.err, "the frozen vision tower ran once"


def test_what_is_no_text_encoder_or_no_pair_is_refused(folders, tmp_path, prepared, vlkit):
    from transformers import CLIPConfig, T5Config

    with pytest.raises(UsageError, match="no text encoder"):
        paired_encoder.pair_config(CLIPConfig(), T5Config())
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--runs-dir", tmp_path, "--name", "x")
    outcome = vlkit(*base, "--text-model", tmp_path)
    assert outcome.code == 2 and "config.json" in outcome.err and not (tmp_path / "x").exists()
    assert vlkit(*base, "--text-model", "somebody/xlmr").code == 7
    folder = tmp_path / "pair"
    loading.load_dual_encoder(str(folders("tiny-clip"))).save(folder)
    weights = load_file(folder / "pair.safetensors")
    save_file({"logit_scale": weights["logit_scale"]}, folder / "pair.safetensors")
    with pytest.raises(ArtifactError, match="another pair"):
        loading.load_dual_encoder(str(folder))
    save_file({**weights, "text_projection.weight": torch.zeros(3, 3)}, folder / "pair.safetensors")
    with pytest.raises(ArtifactError, match="does not fit"):
        loading.load_dual_encoder(str(folder))
    (folder / "pair.json").write_text(json.dumps({"vision": "vision"}))
    with pytest.raises(ArtifactError, match=r"pair\.json"):
        loading.load_dual_encoder(str(folder))


def test_a_frozen_text_encoder_is_kept_too(prepared, vlkit, tmp_path):
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--text-model", "tiny-xlmr")
    flags = ("--runs-dir", tmp_path, "--name", "x", "--steps", 12, "--batch-size", 16, "--tune", "image")
    assert "texts" in vlkit(*base, *flags, "--dry-run", "--json").json()["cache"]


def test_a_half_can_be_taken_from_a_saved_pair_and_a_pair_is_whole(folders, prepared, vlkit, tmp_path):
    created = tmp_path / "pair"
    loading.load_dual_encoder(str(folders("tiny-clip"))).save(created)
    base = ("train-retrieval", "--data", prepared, "--runs-dir", tmp_path, "--steps", 2, "--batch-size", 8)
    halves = ("--model", created / "vision", "--text-model", created / "text")
    assert vlkit(*base, "--name", "halves", *halves).code == 0
    refused = vlkit(*base, "--name", "x", "--model", created, "--text-model", "tiny-xlmr")
    assert refused.code == 2 and "pair already" in refused.err
    refused = vlkit(*base, "--name", "x", "--model", created, "--tune", "lora", "--quantize", "nf4")
    assert refused.code == 2 and "--quantize" in refused.err
    assert vlkit(*base, "--name", "x", "--model", "tiny-clip", "--text-model", "tiny-siglip").code == 2
    assert vlkit(*base, "--name", "x", "--model", "tiny-clip", "--text-model", "./nowhere").code == 2
