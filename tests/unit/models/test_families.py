"""What a new family of models needs: one entry."""

from __future__ import annotations

import math

import pytest
import torch

from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.labels import label_matrix
from vlkit.errors import UsageError
from vlkit.models import families, loading, stages, tuning
from vlkit.models.families import Family
from vlkit.models.preprocessing import CLIP_MEAN, CLIP_STD, FixedSize
from vlkit.models.stages import Stage
from vlkit.training.loop import steps
from vlkit.training.losses import LOSSES
from vlkit.training.optimizer import adamw

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "tart", "blue", "soup", "green", "pie"]
TEXTS = ["red tart", "blue soup", "green pie", "red soup"]
LAYER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def chinese_clip_text_chain(model):
    """A BERT whose first token is projected; padding is masked."""
    text = model.text_model

    def states(ids, _):
        return text(input_ids=ids, attention_mask=(ids != text.config.pad_token_id).long()).last_hidden_state[:, 0]

    return [Stage((text,), states, 2, text.config.hidden_size), stages.module_stage(model.text_projection)]


CHINESE_CLIP = Family(
    name="chinese_clip",
    model_class="ChineseCLIPModel",
    vision_class="ChineseCLIPVisionModel",
    attention_class="ChineseCLIPVisionAttention",
    vision_projection_class=None,
    image_chain=stages.clip_image_chain,
    text_chain=chinese_clip_text_chain,
    patch_chain=stages.clip_patch_chain,
    preprocessing=FixedSize(mean=CLIP_MEAN, std=CLIP_STD, crop=True),
    embedding_width=lambda config: config.projection_dim,
    pads_to_max_length=False,
    pools_at_end=False,
    loss="softmax",
    initial_logit_scale=1 / 0.07,
    initial_logit_bias=None,
    max_logit_scale=100.0,
)


@pytest.fixture
def folder(tmp_path):
    """A tiny ChineseCLIPModel with its tokenizer, as a folder."""
    from transformers import BertTokenizer, ChineseCLIPConfig, ChineseCLIPModel

    torch.manual_seed(0)
    text = {
        **LAYER,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
    }
    vision = {**LAYER, "image_size": 32, "patch_size": 16}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_family_that_has_no_entry_is_refused(folder):
    with pytest.raises(UsageError, match="chinese_clip") as refused:
        loading.load_dual_encoder(str(folder))
    assert refused.value.hint == "vlkit adapts siglip and clip models"


@pytest.mark.parametrize(
    ("family", "scale", "clamped"),
    [
        ("chinese_clip", 150.0, 100.0),
        ("chinese_clip", 50.0, 50.0),
        ("clip", 150.0, 100.0),
        ("clip", 50.0, 50.0),
        ("siglip", 150.0, 150.0),
    ],
)
def test_the_logit_scale_is_clamped_where_its_family_was_trained_so(family, scale, clamped, request, monkeypatch):
    """A published SigLIP has a scale of 112.3, which training must not change."""
    monkeypatch.setitem(families.FAMILIES, CHINESE_CLIP.name, CHINESE_CLIP)
    if family == CHINESE_CLIP.name:
        encoder = loading.load_dual_encoder(str(request.getfixturevalue("folder")))
    else:
        encoder = request.getfixturevalue("tiny")(f"tiny-{family}")
    with torch.no_grad():
        encoder.model.logit_scale.fill_(math.log(scale))
    encoder.clamp_logit_scale()
    assert encoder.family.name == family
    assert encoder.logit_values()["logit_scale"] == pytest.approx(math.log(clamped), rel=1e-6)


@pytest.mark.parametrize("tune", ["full", "last", "lora", "head"])
def test_one_entry_loads_trains_and_exports_a_new_family(tune, folder, tmp_path, monkeypatch):
    from transformers import ChineseCLIPModel

    monkeypatch.setitem(families.FAMILIES, CHINESE_CLIP.name, CHINESE_CLIP)
    encoder = loading.load_dual_encoder(str(folder))
    assert (encoder.width, encoder.text_limit, encoder.pixel_spec.size) == (24, 16, 32)
    pixels = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = encoder.pad(encoder.tokenize(TEXTS)[0])

    # Both towers compute what transformers does.
    theirs = ChineseCLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=encoder.normalize_pixels(pixels)).pooler_output
        texts = theirs.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        assert torch.allclose(encoder.embed_images(pixels), torch.nn.functional.normalize(images, dim=1), atol=1e-6)
        assert torch.allclose(encoder.embed_texts(ids), torch.nn.functional.normalize(texts, dim=1), atol=1e-6)

    config = TrainRetrievalConfig(tune=tune, unfreeze_layers=1) if tune == "last" else TrainRetrievalConfig(tune=tune)
    counts = tuning.apply_tuning(encoder, config, seed=0)
    assert counts.trainable > 0 and (tune == "full") == (counts.trainable == counts.total)
    labels = label_matrix("abcd", "abcd")

    def loss(_):
        return LOSSES[encoder.family.loss](
            encoder.logits(encoder.embed_images(pixels), encoder.embed_texts(ids)), labels
        )

    trained = tuning.trainable(encoder)
    before = {name: p.detach().clone() for name, p in trained.items()}
    tuning.train_mode(encoder)
    optimizer = adamw(trained, lr=1e-3, weight_decay=0)
    losses = [step.loss for step in steps([0] * 10, loss, lambda _: 4, optimizer, total=10)]
    assert losses[-1] < losses[0] and any(not torch.equal(p, before[name]) for name, p in trained.items())

    encoder.eval()
    tuning.export(encoder, tmp_path / "run")
    again = loading.load_exported(tmp_path / "run", str(folder))
    with torch.no_grad():
        assert torch.allclose(again.embed_texts(ids), encoder.embed_texts(ids), atol=1e-6)
        assert torch.allclose(again.embed_images(pixels), encoder.embed_images(pixels), atol=1e-6)
