"""What is trained is trained, what is frozen is bit-equal, and other tools can load the result."""

import dataclasses

import pytest
import torch

from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import ArtifactError, UsageError
from vlkit.models import loading, tuning

CONFIG = TrainRetrievalConfig()


def with_tune(tune, **settings):
    return dataclasses.replace(CONFIG, tune=tune, **settings)


def layers_of(encoder):
    """Encoder layers of the vision and of the text tower."""
    config = encoder.model.config
    return config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers


def loss_of(encoder):
    from vlkit.data.labels import label_matrix
    from vlkit.training.losses import LOSSES

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    texts = encoder.embed_texts(encoder.pad(encoder.tokenize(["red tart", "soup", "blue pie", "bread"])[0]))
    return LOSSES[encoder.family.loss](
        encoder.logits(encoder.embed_images(pixels), texts), label_matrix("abcd", "abcd")
    )


def train_a_little(encoder):
    from vlkit.training.optimizer import adamw

    optimizer = adamw(tuning.trainable(encoder), lr=1e-2, weight_decay=0.01)
    tuning.train_mode(encoder)
    for _ in range(3):
        loss_of(encoder).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_on_the_real_clip_has_the_published_count():
    from transformers import CLIPConfig

    encoder = loading.encoder_on_meta(CLIPConfig())
    counts = tuning.apply_tuning(encoder, with_tune("lora", lora_rank=8), seed=0)
    assert (counts.trainable, counts.total) == (983_041, 152_260_353)


def test_lora_on_the_real_siglip_spares_the_pooling_head():
    from transformers import SiglipConfig

    encoder = loading.encoder_on_meta(SiglipConfig())
    tuning.apply_tuning(encoder, with_tune("lora"), seed=0)
    trained = set(tuning.trainable(encoder))
    assert not [name for name in trained if ".head." in name]
    assert len([name for name in trained if "lora_A" in name]) == 2 * 12 * 4
    assert {"logit_scale", "logit_bias"} <= trained


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
@pytest.mark.parametrize(("tune", "settings"), [("full", {}), ("last", {"unfreeze_layers": 1}), ("lora", {})])
def test_trained_parts_move_and_frozen_parts_are_bit_equal(name, tune, settings, tiny):
    encoder = tiny(name)
    tuning.apply_tuning(encoder, with_tune(tune, **settings), seed=0)
    before = {key: p.detach().clone() for key, p in encoder.model.named_parameters()}
    trained = set(tuning.trainable(encoder))
    train_a_little(encoder)
    moved = {key for key, p in encoder.model.named_parameters() if not torch.equal(p, before[key])}
    # A key bias shifts every score of a query alike, so softmax cancels it: its gradient is rounding, and may be 0.
    assert {key for key in trained - moved if not key.endswith("k_proj.bias")} == set()
    assert moved <= trained


def test_lora_reaches_every_adapter(tiny):
    """Each B starts at zero, so after one step every one must have left it."""
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune("lora"), seed=0)
    train_a_little(encoder)
    b = {name: p for name, p in encoder.model.named_parameters() if "lora_B" in name}
    assert len(b) == 4 * sum(layers_of(encoder))
    assert all(p.abs().max() > 0 for p in b.values())


def test_last_trains_the_upper_layers_and_what_follows(tiny):
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune("last", unfreeze_layers=1), seed=0)
    trained = set(tuning.trainable(encoder))
    assert f"vision_model.encoder.layers.{layers_of(encoder)[0] - 1}.mlp.fc1.weight" in trained
    assert "vision_model.head.attention.in_proj_weight" in trained
    assert "text_model.head.weight" in trained
    assert not [
        name
        for name in trained
        if "embeddings" in name or "vision_model.encoder.layers.0." in name or "text_model.encoder.layers.0." in name
    ]
    with pytest.raises(UsageError, match="the towers have"):
        tuning.apply_tuning(tiny("tiny-siglip"), with_tune("last", unfreeze_layers=9), seed=0)


def test_dropout_is_on_in_adapters_and_off_in_what_is_frozen(tiny):
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune("lora", lora_dropout=0.5), seed=0)
    tuning.train_mode(encoder)
    modes = {name: module.training for name, module in encoder.model.named_modules()}
    assert all(on for name, on in modes.items() if "lora_dropout" in name)
    assert not any(on for name, on in modes.items() if name.endswith((".mlp", ".mlp.fc1", "layer_norm1", ".head")))


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_is_exported_opens_elsewhere(tune, tiny, tiny_folder, tmp_path):
    """AutoModel opens model/, PeftModel opens adapter/ on its base; embeddings equal to 1e-5."""
    from peft import PeftModel
    from transformers import AutoModel

    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune(tune), seed=0)
    train_a_little(encoder)
    encoder.eval()
    expected = loss_of(encoder).item()
    exported = tuning.export(encoder, tmp_path)
    ids = encoder.pad(encoder.tokenize(["red tart", "blue pie"])[0])
    base = str(tiny_folder("tiny-siglip"))
    other = AutoModel.from_pretrained(exported if tune == "full" else base)
    if tune == "lora":
        other = PeftModel.from_pretrained(other, exported)
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(other.get_text_features(input_ids=ids).pooler_output, dim=1)
        assert torch.allclose(theirs, encoder.embed_texts(ids), atol=1e-5)
        assert loss_of(loading.load_exported(tmp_path, base)).item() == pytest.approx(expected, rel=1e-5)


def test_an_adapter_of_another_model_is_refused(tiny, tiny_folder, tmp_path):
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune("lora"), seed=0)
    tuning.export(encoder, tmp_path)
    with pytest.raises(ArtifactError):
        loading.load_exported(tmp_path, str(tiny_folder("tiny-clip")))
    with pytest.raises(ArtifactError, match="no trained model"):
        loading.load_exported(tmp_path / "elsewhere", str(tiny_folder("tiny-clip")))


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
def test_a_merged_model_is_the_adapted_one(name, tiny, tmp_path):
    """model/ in AutoModel, without PEFT: the same embeddings and logits to 1e-5, and none of the base's."""
    from transformers import AutoModel

    encoder = tiny(name)
    tuning.apply_tuning(encoder, with_tune("lora"), seed=0)
    train_a_little(encoder)
    encoder.eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        before, untouched = encoder.embed_images(pixels), tiny(name).embed_images(pixels)
        tuning.export(encoder, tmp_path)
        merged = tuning.export_merged(encoder, tmp_path)
        assert torch.allclose(encoder.embed_images(pixels), before, atol=1e-5)
        again = loading.load_dual_encoder(str(merged))
        assert torch.allclose(again.embed_images(pixels), before, atol=1e-5)
    assert not torch.allclose(untouched, before, atol=1e-3)
    assert not [key for key, _ in AutoModel.from_pretrained(merged).named_parameters() if "lora" in key]
    for key, parameter in again.logit_parameters().items():
        assert torch.equal(parameter, encoder.logit_parameters()[key])


IMAGE, TEXT = ("vision_model.", "visual_projection."), ("text_model.", "text_projection.")


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tune": "text"}, lambda n: n.startswith(TEXT)),
        ({"tune": "image"}, lambda n: n.startswith(IMAGE)),
        ({"tune": "full", "towers": "image"}, lambda n: n.startswith(IMAGE)),
        ({"tune": "head"}, lambda n: ".head." in n or "_projection." in n),
        ({"tune": "head", "towers": "text"}, lambda n: n.startswith("text_model.head.") or "text_projection" in n),
        ({"tune": "lora", "towers": "text"}, lambda n: n.startswith("text_model.") and "lora_" in n),
        (
            {"tune": "last", "unfreeze_layers": 1, "trainable": ("*self_attn*", "*out_proj*", "*layernorm*")},
            lambda n: (
                "layers.1.self_attn" in n
                or (("layernorm" in n or "out_proj" in n) and (".layers.1." in n or ".layers." not in n))
            ),
        ),
        (
            {"tune": "full", "trainable": ("text_model.*bias",)},
            lambda n: n.startswith("text_model.") and n[-4:] == "bias",
        ),
    ],
)
def test_what_is_chosen_is_trained_and_nothing_else(name, settings, expected, tiny):
    encoder = tiny(name)
    assert set(layers_of(encoder)) == {2}
    tuning.apply_tuning(encoder, with_tune(**settings), seed=0)
    chosen = {key for key, _ in encoder.model.named_parameters() if expected(key)}
    assert chosen
    assert set(tuning.trainable(encoder)) == chosen | {key for key in ("logit_scale", "logit_bias")} & set(
        encoder.logit_parameters()
    )


@pytest.mark.parametrize("settings", [{"tune": "text", "towers": "image"}, {"merge": True}])
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(UsageError):
        TrainRetrievalConfig(**settings).refuse_idle()


def test_a_name_that_no_trained_parameter_has_is_refused(tiny):
    with pytest.raises(UsageError, match=r"'vision_model.\*': no parameter that --tune chose"):
        tuning.apply_tuning(tiny("tiny-clip"), with_tune("text", trainable=("*bias", "vision_model.*")), seed=0)


@pytest.mark.parametrize("name", ["tiny-siglip", "tiny-clip"])
@pytest.mark.parametrize("tune", ["full", "last", "lora"])
def test_activations_computed_again_give_the_same_gradients(name, tune, tiny):
    grads = []
    for again in (False, True):
        encoder = tiny(name)
        settings = with_tune(tune, lora_dropout=0.2, unfreeze_layers=1, checkpoint_activations=again)
        tuning.apply_tuning(encoder, settings, seed=0)
        for key, parameter in encoder.model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(key)))
        tuning.train_mode(encoder)
        assert encoder.model.is_gradient_checkpointing is again
        torch.manual_seed(3)
        loss_of(encoder).backward()
        grads.append({key: p.grad for key, p in tuning.trainable(encoder).items()})
    plain, again = grads
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_heads_and_logits_can_have_rates_of_their_own(tiny):
    from vlkit.training.optimizer import adamw

    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, with_tune("full"), seed=0)
    named = tuning.trainable(encoder)
    rates = tuning.learning_rates(named, head=3e-3, logit=5e-2)
    optimizer = adamw(named, lr=1e-4, weight_decay=0.1, rates=rates)
    actual = {
        key: (group["peak_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for key in group["param_names"]
    }
    assert actual.keys() == named.keys()
    for key, parameter in named.items():
        rate = 5e-2 if key.startswith("logit") else 3e-3 if ".head." in key else 1e-4
        assert actual[key] == (rate, 0.1 if parameter.ndim > 1 else 0.0)
    assert optimizer.param_groups[0]["peak_lr"] == 1e-4
