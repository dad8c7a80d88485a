"""A text encoder of any kind beside CLIP's or SigLIP's vision tower."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import ArtifactError, UsageError
from vlkit.models import families, loading, paired_encoder, tuning

TEXTS = ["قورمه سبزی", "a red tart", "a soup that is blue, and a long one", "bread", "قورمه‌سبزی"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Fresh pairs by the name of their vision tower, made once."""
    made = {}

    def folder(vision):
        if vision not in made:
            made[vision] = tmp_path_factory.mktemp(vision) / "pair"
            loading.load_or_create(vision, TEXTS, seed=3, text_model="tiny-xlmr", keep_in=made[vision])
        return made[vision]

    return folder


@pytest.mark.parametrize("vision", ["tiny-clip", "tiny-siglip"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_are_what_transformers_and_a_matrix_make_of_them(vision, pooling, folders, tmp_path):
    """One text at a time through AutoModel, its real tokens pooled: padding changes nothing."""
    from transformers import AutoModel, AutoTokenizer

    folder = folders(vision)
    made = loading.load_dual_encoder(str(folder))
    made.model.config.pooling = pooling
    tokenizer, alone = AutoTokenizer.from_pretrained(folder / "text"), AutoModel.from_pretrained(folder / "text").eval()
    projection = load_file(folder / "pair.safetensors")["text_projection.weight"]
    with torch.no_grad():
        found = made.embed_texts(made.pad(made.tokenize(TEXTS)[0]))
        for text, embedded in zip(TEXTS, found, strict=True):
            states = alone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            pooled = states.mean(0) if pooling == "mean" else states[0]
            assert torch.allclose(embedded, torch.nn.functional.normalize(projection @ pooled, dim=0), atol=1e-5)
    ids = made.tokenize(TEXTS)[0]
    assert ids[0] != ids[4], "the joiner between the letters is read"


@pytest.mark.parametrize("vision", ["tiny-clip", "tiny-siglip"])
def test_the_vision_half_is_the_models(vision, folders, tmp_path):
    """Its embeddings are those of the whole model; saved, it opens in transformers, preprocessing and all."""
    from transformers import AutoModel

    made = loading.load_dual_encoder(str(folders(vision)))
    whole = loading.load_dual_encoder(str(folders(vision) / "vision"))
    pixels = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(made.embed_images(pixels), whole.embed_images(pixels))
        made.save(tmp_path)
        alone = AutoModel.from_pretrained(tmp_path / "vision")(pixel_values=made.normalize_pixels(pixels))
        theirs = alone.pooler_output
        if vision == "tiny-clip":
            theirs = made.model.visual_projection(theirs)
        assert torch.allclose(torch.nn.functional.normalize(theirs, dim=1), made.embed_images(pixels), atol=1e-5)
    assert made.pixel_spec == whole.pixel_spec == loading.load_dual_encoder(str(tmp_path)).pixel_spec
    assert set(made.logit_parameters()) == set(whole.logit_parameters())


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
        assert "cache of pictures" in outcome.err, "the frozen vision tower ran once"


def test_lora_finds_the_attention_of_bert_and_its_kin():
    import re

    from transformers import BertConfig, CLIPConfig, DistilBertConfig, XLMRobertaConfig

    for text, layers in ((BertConfig(), 12), (XLMRobertaConfig(), 12), (DistilBertConfig(), 6)):
        made = loading.encoder_on_meta(paired_encoder.pair_config(CLIPConfig(), text))
        for targets in (("q",), ("q", "k", "v", "out")):
            pattern = re.compile(tuning.lora_pattern(families.CLIP, targets, "text"))
            found = [name for name, _ in made.model.named_modules() if pattern.fullmatch(name)]
            assert len(found) == layers * len(targets), text.model_type
    counts = tuning.apply_tuning(made, TrainRetrievalConfig(tune="lora"), seed=0)
    # r 8 on 4 projections of 768 in 6 + 12 layers, 512 x 768 of the new projection, and the scale.
    assert counts.trainable == (6 + 12) * 4 * 8 * 2 * 768 + 512 * 768 + 1


def test_real_shapes_of_a_persian_encoder():
    """XLM-R base beside CLIP ViT-B/32: 512 tokens of 514 positions, as its tokenizer has it."""
    from transformers import CLIPConfig, XLMRobertaConfig

    made = loading.encoder_on_meta(
        paired_encoder.pair_config(CLIPConfig(), XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514))
    )
    assert made.text_limit == 512 and made.width == 512 and not made.pads_to_max_length
    counts = tuning.apply_tuning(made, TrainRetrievalConfig(tune="text"), seed=0)
    assert counts.total - counts.trainable == 87_456_000 + 768 * 512  # CLIP's vision tower and its projection


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


def test_pooling_is_what_the_text_model_says_and_stays_so(folders, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(folders("tiny-clip") / "text", text)
    assert paired_encoder.text_pooling(str(text)) == "mean"
    (text / "1_Pooling").mkdir()
    told = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (text / "1_Pooling/config.json").write_text(json.dumps(told))
    assert paired_encoder.text_pooling(str(text)) == "cls"
    made = loading.load_or_create("tiny-clip", TEXTS, seed=1, text_model=str(text), keep_in=tmp_path / "base")
    assert made.model.config.pooling == "cls"
    made.save(tmp_path / "saved")
    again = loading.load_dual_encoder(str(tmp_path / "saved"))
    ids = made.pad(made.tokenize(TEXTS)[0])
    with torch.no_grad():
        assert torch.allclose(again.embed_texts(ids), made.embed_texts(ids), atol=1e-6)
        again.model.config.pooling = "mean"
        assert not torch.allclose(again.embed_texts(ids), made.embed_texts(ids), atol=1e-6)
    (text / "1_Pooling/config.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        paired_encoder.text_pooling(str(text))


def test_an_encoder_whose_layers_are_not_known_is_refused():
    from transformers import CLIPConfig, ModernBertConfig, MPNetConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    modern = loading.encoder_on_meta(
        paired_encoder.pair_config(CLIPConfig(), ModernBertConfig(vocab_size=100, pad_token_id=0, **small))
    )
    for tune in ("lora", "last"):
        with pytest.raises(UsageError, match="does not know"):
            tuning.apply_tuning(modern, TrainRetrievalConfig(tune=tune), seed=0)
    mpnet = loading.encoder_on_meta(paired_encoder.pair_config(CLIPConfig(), MPNetConfig(vocab_size=100, **small)))
    tuning.apply_tuning(mpnet, TrainRetrievalConfig(tune="lora"), seed=0)
    assert len([n for n in tuning.trainable(mpnet) if n.startswith("text_model") and "lora_A" in n]) == 2 * 4


def test_a_frozen_text_encoder_is_kept_too(prepared, vlkit, tmp_path):
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--text-model", "tiny-xlmr")
    flags = ("--runs-dir", tmp_path, "--name", "x", "--steps", 12, "--batch-size", 16, "--tune", "image")
    assert "texts" in vlkit(*base, *flags, "--dry-run", "--json").json()["cache"]


def test_a_half_can_be_taken_from_a_saved_pair_and_a_pair_is_whole(folders, prepared, vlkit, tmp_path):
    made = tmp_path / "pair"
    loading.load_dual_encoder(str(folders("tiny-clip"))).save(made)
    base = ("train-retrieval", "--data", prepared, "--runs-dir", tmp_path, "--steps", 2, "--batch-size", 8)
    halves = ("--model", made / "vision", "--text-model", made / "text")
    assert vlkit(*base, "--name", "halves", *halves).code == 0
    refused = vlkit(*base, "--name", "x", "--model", made, "--text-model", "tiny-xlmr")
    assert refused.code == 2 and "pair already" in refused.err
    refused = vlkit(*base, "--name", "x", "--model", made, "--tune", "lora", "--quantize", "nf4")
    assert refused.code == 2 and "--quantize" in refused.err
    assert vlkit(*base, "--name", "x", "--model", "tiny-clip", "--text-model", "tiny-siglip").code == 2
    assert vlkit(*base, "--name", "x", "--model", "tiny-clip", "--text-model", "./nowhere").code == 2
