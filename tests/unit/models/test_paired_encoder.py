"""A text encoder of any kind beside CLIP's or SigLIP's vision tower."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import ArtifactError, UsageError
from vlkit.models import families, loading, paired_encoder, tuning

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


@pytest.mark.parametrize("vision", ["tiny-clip", "tiny-siglip"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_are_what_transformers_and_a_matrix_make_of_them(vision, pooling, folders, tmp_path):
    """One text at a time through AutoModel, its real tokens pooled: padding changes nothing."""
    from transformers import AutoModel, AutoTokenizer

    folder = folders(vision)
    model = loading.load_dual_encoder(str(folder))
    model.model.config.pooling = pooling
    tokenizer, alone = AutoTokenizer.from_pretrained(folder / "text"), AutoModel.from_pretrained(folder / "text").eval()
    projection = load_file(folder / "pair.safetensors")["text_projection.weight"]
    with torch.no_grad():
        actual = model.embed_texts(model.pad(model.tokenize(TEXTS)[0]))
        for text, embedded in zip(TEXTS, actual, strict=True):
            states = alone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            pooled = states.mean(0) if pooling == "mean" else states[0]
            assert torch.allclose(embedded, torch.nn.functional.normalize(projection @ pooled, dim=0), atol=1e-5)
    ids = model.tokenize(TEXTS)[0]
    assert ids[0] != ids[4], "the joiner between the letters is read"


@pytest.mark.parametrize("vision", ["tiny-clip", "tiny-siglip"])
def test_the_vision_half_is_the_models(vision, folders, tmp_path):
    """Its embeddings are those of the whole model; saved, it opens in transformers, preprocessing and all."""
    from transformers import AutoModel

    model = loading.load_dual_encoder(str(folders(vision)))
    whole = loading.load_dual_encoder(str(folders(vision) / "vision"))
    pixels = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.embed_images(pixels), whole.embed_images(pixels))
        model.save(tmp_path)
        alone = AutoModel.from_pretrained(tmp_path / "vision")(pixel_values=model.normalize_pixels(pixels))
        theirs = alone.pooler_output
        if vision == "tiny-clip":
            theirs = model.model.visual_projection(theirs)
        assert torch.allclose(torch.nn.functional.normalize(theirs, dim=1), model.embed_images(pixels), atol=1e-5)
    assert model.pixel_spec == whole.pixel_spec == loading.load_dual_encoder(str(tmp_path)).pixel_spec
    assert set(model.logit_parameters()) == set(whole.logit_parameters())


def test_lora_finds_the_attention_of_bert_and_its_kin():
    import re

    from transformers import BertConfig, CLIPConfig, DistilBertConfig, XLMRobertaConfig

    for text, layers in ((BertConfig(), 12), (XLMRobertaConfig(), 12), (DistilBertConfig(), 6)):
        model = loading.encoder_on_meta(paired_encoder.pair_config(CLIPConfig(), text))
        for targets in (("q",), ("q", "k", "v", "out")):
            pattern = re.compile(tuning.lora_pattern(families.CLIP, targets, "text"))
            actual = [name for name, _ in model.model.named_modules() if pattern.fullmatch(name)]
            assert len(actual) == layers * len(targets), text.model_type
    counts = tuning.apply_tuning(model, TrainRetrievalConfig(tune="lora"), seed=0)
    # r 8 on 4 projections of 768 in 6 + 12 layers, 512 x 768 of the new projection, and the scale.
    assert counts.trainable == (6 + 12) * 4 * 8 * 2 * 768 + 512 * 768 + 1


def test_real_shapes_of_a_persian_encoder():
    """XLM-R base beside CLIP ViT-B/32: 512 tokens of 514 positions, as its tokenizer has it."""
    from transformers import CLIPConfig, XLMRobertaConfig

    model = loading.encoder_on_meta(
        paired_encoder.pair_config(CLIPConfig(), XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514))
    )
    assert model.text_limit == 512 and model.width == 512 and not model.pads_to_max_length
    counts = tuning.apply_tuning(model, TrainRetrievalConfig(tune="text"), seed=0)
    assert counts.total - counts.trainable == 87_456_000 + 768 * 512  # CLIP's vision tower and its projection


def test_pooling_is_what_the_text_model_says_and_stays_so(folders, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(folders("tiny-clip") / "text", text)
    assert paired_encoder.text_pooling(str(text)) == "mean"
    (text / "1_Pooling").mkdir()
    report = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (text / "1_Pooling/config.json").write_text(json.dumps(report))
    assert paired_encoder.text_pooling(str(text)) == "cls"
    model = loading.load_or_create("tiny-clip", TEXTS, seed=1, text_model=str(text), keep_in=tmp_path / "base")
    assert model.model.config.pooling == "cls"
    model.save(tmp_path / "saved")
    again = loading.load_dual_encoder(str(tmp_path / "saved"))
    ids = model.pad(model.tokenize(TEXTS)[0])
    with torch.no_grad():
        assert torch.allclose(again.embed_texts(ids), model.embed_texts(ids), atol=1e-6)
        again.model.config.pooling = "mean"
        assert not torch.allclose(again.embed_texts(ids), model.embed_texts(ids), atol=1e-6)
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
