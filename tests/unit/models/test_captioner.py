"""A captioner from inside: its loss, its gradients, what is trained of it, and the captions that it writes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.data.loading.caption_batches import CaptionBatch, pad_captions
from vlkit.distributed import World
from vlkit.models.captioner import language_model as language_module
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.fusion import Fusion, FusionShape
from vlkit.models.captioner.language_model import LanguageModel, llm_on_meta, load_llm
from vlkit.models.captioner.vision_encoder import load_vision_encoder, vision_encoder_on_meta
from vlkit.models.device import autocast
from vlkit.models.fast import layers
from vlkit.models.fast.linear import Linear
from vlkit.training.caption_loss import CaptionLoss
from vlkit.training.loop import steps
from vlkit.training.optimizer import adamw

CAPTIONS = ("a red tart", "a green soup on a plate", "blue", "a yellow cake, cut", "one white bread", "red soup")
PROMPT = "Describe the picture."


@pytest.fixture
def captioner(tiny_folder, tiny_llm):
    """A fresh captioner, with as many queries and layers as asked for."""

    def make(vision="tiny-siglip", quantize="none", precision="fp32", llm=tiny_llm, **shape) -> Captioner:
        language = load_llm(str(llm), quantize=quantize, precision=precision)
        encoder = load_vision_encoder(str(tiny_folder(vision)))
        return Captioner.fresh(encoder, language, PROMPT, precision, seed=3, **{"queries": 6, **shape})

    return make


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 64, 64), dtype=np.uint8))


def batch_of(created: Captioner, rows: range | list[int], words: int | None = None) -> CaptionBatch:
    tokens = [[*created.language.tokens(CAPTIONS[row]), created.language.eos_id] for row in rows]
    captions, lengths = pad_captions(tokens, created.language.pad_id)
    observed = pictures(len(CAPTIONS))[list(rows)]
    total = int(lengths.sum()) if words is None else words
    return CaptionBatch(observed, torch.arange(len(lengths)), captions, lengths, total, [str(row) for row in rows])


def gradients(created: Captioner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in created.trainable().items()}


def backward(created: Captioner, batch: CaptionBatch, alpha: float = 0.1, micro_batch: int | None = None) -> float:
    for p in created.trainable().values():
        p.grad = None
    total = 0.0
    for part in CaptionLoss(created, alpha, micro_batch)(batch):
        part.surrogate.backward()
        total += float(part.loss.detach())
    return total


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in one.values())
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * max(1.0, largest), name


def test_the_loss_and_its_gradients_are_those_of_transformers(captioner):
    model = captioner()
    batch = batch_of(model, range(6))
    loss = backward(model, batch, alpha=0.0)
    ours = gradients(model)
    # The same by transformers' own forward, with all logits and labels of -100 where no caption is.
    for p in model.trainable().values():
        p.grad = None
    visual = model.fusion(model.patches(batch.images))
    embed = model.language.model.get_input_embeddings()
    before, after = (embed(torch.tensor([ids])).expand(6, -1, -1) for ids in (model.prefix, model.suffix))
    report = torch.cat([before, visual, after, embed(batch.captions)], dim=1)
    there = torch.arange(batch.captions.shape[1]) < batch.lengths[:, None]
    head = torch.full((6, report.shape[1] - batch.captions.shape[1]), -100)
    labels = torch.cat([head, batch.captions.masked_fill(~there, -100)], dim=1)
    mask = torch.cat([torch.ones_like(head), there.long()], dim=1)
    theirs = model.language.model(inputs_embeds=report, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-5)
    close(ours, gradients(model), 1e-5)


@settings(max_examples=25, deadline=None)
@given(words=st.integers(1, 40), vocabulary=st.integers(2, 30), chunk=st.integers(1, 41), biased=st.booleans())
def test_the_frozen_head_is_cross_entropy_in_chunks_of_any_size(words, vocabulary, chunk, biased):
    created = torch.Generator().manual_seed(words * 1000 + vocabulary)
    states = torch.randn(words, 7, generator=created, requires_grad=True)
    weight = torch.randn(vocabulary, 7, generator=created)
    bias = torch.randn(vocabulary, generator=created) if biased else None
    targets = torch.randint(vocabulary, (words,), generator=created)
    expected = F.cross_entropy(F.linear(states, weight, bias), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected * 3, states)
    before, language_module.WORDS_AT_ONCE = language_module.WORDS_AT_ONCE, chunk
    try:
        actual = language_module._FrozenHead.apply(states, weight, bias, targets)
        (ours,) = torch.autograd.grad(actual * 3, states)
    finally:
        language_module.WORDS_AT_ONCE = before
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


def test_the_alignment_is_a_cosine_without_the_vocabularys_mean(captioner):
    model = captioner()
    batch = batch_of(model, range(4))
    actual = model.losses(model.patches(batch.images), batch.captions, batch.lengths, with_alignment=True)
    table = model.language.embeddings
    visual, expected = model.fusion(model.patches(batch.images)), 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        messages = table[batch.captions[row, :length]].mean(dim=0) - table.mean(dim=0)
        observed = visual[row].mean(dim=0) - table.mean(dim=0)
        expected += length * (1 - F.cosine_similarity(observed, messages, dim=0).item())
    assert actual.alignment.item() == pytest.approx(expected, rel=1e-5)
    assert actual.token_count == int(batch.lengths.sum())


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
def test_micro_batches_change_no_gradient(micro_batch, captioner):
    model = captioner()
    batch = batch_of(model, range(6))
    loss = backward(model, batch)
    whole = gradients(model)
    assert backward(model, batch, micro_batch=micro_batch) == pytest.approx(loss, abs=1e-5)
    close(whole, gradients(model), 1e-5)


def test_accumulation_counts_the_words_of_the_whole_window(captioner):
    """1 x 6 equals 2 x 3 and 3 x 2, though captions are of other lengths."""
    ends = []
    for parts in (1, 2, 3):
        model = captioner()
        size = 6 // parts
        window = [batch_of(model, range(start, start + size)) for start in range(0, 6, size)]
        optimizer = adamw(model.trainable(), lr=1e-2, weight_decay=0.0)
        chosen = steps(
            window, CaptionLoss(model, 0.1, None), lambda batch: batch.token_count, optimizer, total=1, accumulate=parts
        )
        (step,) = list(chosen)
        ends.append((step.loss, step.grad_norm))
    assert ends[1] == pytest.approx(ends[0], rel=1e-5) and ends[2] == pytest.approx(ends[0], rel=1e-5)


def test_the_shares_of_two_processes_add_up(captioner):
    model = captioner()
    whole = batch_of(model, range(5))
    loss = backward(model, whole)
    expected = gradients(model)
    shares = [World(rank, 2).shard(5) for rank in range(2)]
    actual, total = {}, 0.0
    for share in shares:
        total += backward(model, batch_of(model, list(range(5))[share], words=whole.token_count))
        actual = {name: actual.get(name, 0) + value for name, value in gradients(model).items()}
    assert total == pytest.approx(loss, abs=1e-5)
    close(expected, actual, 1e-5)


def test_a_share_without_captions_has_no_parts(captioner):
    model = captioner()
    assert list(CaptionLoss(model, 0.1, None)(batch_of(model, [], words=9))) == []


def test_what_is_trained_moves_and_what_is_frozen_stays_bit_by_bit(captioner):
    model = captioner(layers=2)
    trained = model.trainable()
    assert all(name.startswith("fusion.") for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    assert not model.language.training and not model.vision.training
    batch = batch_of(model, range(6))
    optimizer = adamw(trained, lr=1e-2, weight_decay=0.01)
    list(steps([batch] * 2, CaptionLoss(model, 0.1, None), lambda b: b.token_count, optimizer, total=2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained), name


def test_two_captions_are_learned_and_written_again(captioner, tiny_qwen):
    """With a LoRA: this language model has had a hundred steps, and would not find such words by itself."""
    model = captioner(queries=4, llm=tiny_qwen)
    model.language.insert_lora(rank=8, alpha=16.0, dropout=0.0, seed=1)
    texts = ["red tart number 0", "A soup that is blue, made 7 times."]
    captions, lengths = pad_captions(model.language.captions(texts, 40)[0], model.language.pad_id)
    black_and_white = torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), 255)]).to(torch.uint8)
    batch = CaptionBatch(black_and_white, torch.arange(2), captions, lengths, int(lengths.sum()), ["0", "1"])
    optimizer = adamw(model.trainable(), lr=5e-3, weight_decay=0.0)
    chosen = list(steps([batch] * 150, CaptionLoss(model, 0.0, None), lambda b: b.token_count, optimizer, total=150))
    assert chosen[-1].loss < 0.2 < chosen[0].loss
    patches = model.eval().patches(batch.images)
    assert model.generate(patches, max_new_tokens=40) == texts
    # Of the other's picture the other's words.
    assert model.generate(patches.flip(0), max_new_tokens=40) == texts[::-1]


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_and_the_cache_change_no_word(beams, captioner):
    model = captioner().eval()
    patches = model.patches(pictures(5))
    together = model.generate(patches, max_new_tokens=12, num_beams=beams)
    assert together == [model.generate(patches[[row]], max_new_tokens=12, num_beams=beams)[0] for row in range(5)]
    assert together == model.generate(patches, max_new_tokens=12, num_beams=beams, use_cache=False)
    assert model.generate(patches[:0], max_new_tokens=3) == []


def test_captions_are_greedy_whatever_the_model_brings_along(captioner):
    from transformers import GenerationConfig

    model = captioner().eval()
    patches = model.patches(pictures(3))
    plain = model.generate(patches, max_new_tokens=8)
    brought = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, top_k=50)
    model.language.model.generation_config = brought
    assert model.generate(patches, max_new_tokens=8) == plain
    assert model.language.model.generation_config is brought


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_model_trains_writes_and_trains_again(quantize, captioner):
    model = captioner(quantize=quantize)
    batch = batch_of(model, range(4))
    backward(model, batch)
    first = gradients(model)
    assert all(torch.isfinite(value).all() for value in first.values())
    assert float(first["fusion.adapter.1.weight"].abs().max()) > 0
    model.eval()
    patches = model.patches(batch.images)
    words = model.generate(patches, max_new_tokens=6)
    backward(model.train(), batch)
    close(first, gradients(model), 1e-6)
    assert model.eval().generate(patches, max_new_tokens=6) == words


def test_quantised_gradients_point_where_the_whole_models_do(captioner):
    whole, packed = captioner(), captioner(quantize="nf4")
    actual = []
    for created in (whole, packed):
        backward(created, batch_of(created, range(6)), alpha=0.0)
        actual.append(torch.cat([value.flatten() for value in gradients(created).values()]))
    assert float(F.cosine_similarity(*actual, dim=0)) > 0.9


def test_activations_computed_again_change_no_gradient(captioner):
    model = captioner()
    batch = batch_of(model, range(4))
    backward(model.train(), batch)
    remaining = gradients(model)
    again = captioner()
    again.language.checkpoint_activations()
    again.train()
    ran = []
    layer = again.language.model.model.layers[0].input_layernorm
    layer.register_forward_hook(lambda *_: ran.append(1))
    backward(again, batch)
    assert len(ran) == 2, "the layer is run once more on the way back"
    close(remaining, gradients(again), 1e-6)
    again.eval()
    ran.clear()
    again.generate(again.patches(batch.images), max_new_tokens=1)
    assert len(ran) == 1


def test_a_lora_is_trained_beside_the_fusion_and_nothing_else(captioner):
    model = captioner()
    model.language.insert_lora(rank=2, alpha=4.0, dropout=0.5, seed=1)
    trained = model.trainable()
    adapters = {name for name in trained if name.startswith("llm.")}
    assert adapters and all("lora_" in name and "self_attn" in name for name in adapters)
    layers = model.language.model.config.num_hidden_layers
    assert len(adapters) == layers * 4 * 2
    model.train()
    dropouts = [m for m in model.language.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(m.training for m in dropouts)
    backward(model, batch_of(model, range(4)))
    model.eval()
    assert not any(m.training for m in model.language.modules())


def test_the_fusion_is_float32_whatever_surrounds_it():
    fusion = Fusion(FusionShape(16, 9, 24, queries=5, layers=2))
    patches = torch.randn(2, 9, 16)
    plain = fusion(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fusion(patches)
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)
    assert plain.shape == (2, 5, 24)
    assert Fusion(FusionShape(16, 9, 24, kind="mlp"))(patches).shape == (2, 9, 24)


def test_an_encoder_with_features_ten_times_as_large_makes_no_other_start():
    fusion = Fusion(FusionShape(16, 9, 24))
    patches = torch.randn(2, 9, 16)
    torch.testing.assert_close(fusion(patches), fusion(10 * patches), rtol=1e-3, atol=1e-3)


def test_the_cross_attention_is_torchs():
    from vlkit.models.captioner.fusion import CrossAttention

    ours = CrossAttention(128)
    theirs = torch.nn.MultiheadAttention(128, ours.heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    tokens, observed = torch.randn(2, 5, 128), torch.randn(2, 9, 128)
    asked, looked = ours.query_norm(tokens), ours.seen_norm(observed)
    attended = tokens + theirs(asked, looked, looked)[0]
    torch.testing.assert_close(ours(tokens, observed), attended + ours.feed_forward(attended), rtol=1e-4, atol=1e-5)


# The frozen parts


def test_siglips_patches_are_its_last_states(tiny_folder):
    from transformers import SiglipVisionModel

    encoder = load_vision_encoder(str(tiny_folder("tiny-siglip")))
    alone = SiglipVisionModel.from_pretrained(tiny_folder("tiny-siglip")).eval()
    observed = pictures(3)
    with torch.no_grad():
        expected = alone(pixel_values=encoder.normalize_pixels(observed)).last_hidden_state
    torch.testing.assert_close(encoder(observed), expected, rtol=1e-5, atol=1e-5)
    assert (encoder.patches, encoder.width) == expected.shape[1:]


def test_clips_patches_are_those_before_its_last_layer_without_the_class_token(tiny_folder):
    from transformers import CLIPModel

    encoder = load_vision_encoder(str(tiny_folder("tiny-clip")))
    whole = CLIPModel.from_pretrained(tiny_folder("tiny-clip")).eval()
    observed = pictures(3)
    with torch.no_grad():
        states = whole.vision_model(
            pixel_values=encoder.normalize_pixels(observed), output_hidden_states=True
        ).hidden_states
    torch.testing.assert_close(encoder(observed), states[-2][:, 1:], rtol=1e-5, atol=1e-5)


def test_siglip2_of_any_resolution_is_asked_for_squares(tmp_path):
    """Beside transformers' own processor, which cuts the patches itself."""
    from PIL import Image
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Siglip2Config(vision_config={**vision, "num_patches": 16, "patch_size": 8}, text_config={**vision})
    model = Siglip2Model(config).eval()
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_vision_encoder(str(tmp_path))
    assert (encoder.pixel_spec.size, encoder.patches) == (32, 16)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        expected = model.vision_model(
            inputs["pixel_values"], inputs["pixel_attention_mask"], inputs["spatial_shapes"]
        ).last_hidden_state
    actual = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    layer = encoder.vision.encoder.layers[0]
    assert layer.self_attn.config._attn_implementation == layers.ATTENTION_NAME
    assert (type(layer.layer_norm1), type(layer.mlp.fc1)) == (layers.NarrowLayerNorm, Linear)
    with autocast(torch.device("cpu"), "bf16"):
        assert (encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None]) - expected).norm() < 0.02 * expected.norm()


def test_a_blank_picture_is_zero_to_the_encoder(tiny_folder):
    encoder = load_vision_encoder(str(tiny_folder("tiny-siglip")))
    assert encoder.normalize_pixels(encoder.blank()).abs().max() < 0.01


def test_the_published_recipe_has_the_shapes_of_its_papers():
    """SigLIP B/16 and Qwen2.5-1.5B on the meta device: their published configurations, no byte of weights."""
    from transformers import Qwen2Config, SiglipVisionConfig

    vision = vision_encoder_on_meta(SiglipVisionConfig(image_size=224, patch_size=16))
    qwen = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_theta=1e6,
    )
    language = llm_on_meta(qwen)
    assert sum(p.numel() for p in language.parameters()) == 1_543_714_304
    assert (vision.patches, vision.width, language.hidden_size) == (196, 768, 1536)
    with torch.device("meta"):
        fusion = Fusion(FusionShape(768, 196, 1536))
    hidden, counted = 1536, sum(p.numel() for p in fusion.parameters())
    adapter = 2 * 768 + (768 * hidden + hidden) + (hidden * hidden + hidden)
    attention = 4 * (hidden * hidden + hidden) + 2 * 2 * hidden
    forward = 2 * hidden + (hidden * 4 * hidden + 4 * hidden) + (4 * hidden * hidden + hidden)
    assert counted == adapter + 32 * hidden + 196 * hidden + attention + forward + 2 * hidden + 1
    patches = torch.zeros((4, 196, 768), device="meta")
    visual = fusion(patches)
    assert visual.shape == (4, 32, 1536)
    # A mask of all positions: a shorter one is looked into, which nothing without numbers can be.
    states = language.states(visual, torch.zeros((4, 1, 32, 32), device="meta"))
    assert states.shape == (4, 32, 1536)


# The language model's odds and ends


def without(folder, tmp_path, change) -> LanguageModel:
    model = load_llm(str(folder), quantize="none", precision="fp32")
    tokenizer = copy.deepcopy(model.tokenizer)
    change(tokenizer)
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True) if not tokenizer.chat_template else None
    return load_llm(str(tmp_path), quantize="none", precision="fp32")


def test_without_a_chat_template_the_prompt_stands_as_it_is(tiny_llm, tmp_path):
    created = without(tiny_llm, tmp_path, lambda tokenizer: setattr(tokenizer, "chat_template", None))
    assert not created.has_chat
    asked = created.prompt_ids(PROMPT)
    assert created.tokenizer.decode([*asked.prefix, *asked.suffix]) == f"{PROMPT}\n"


def test_the_prompt_stands_in_the_chat_behind_the_picture(tiny_llm):
    model = load_llm(str(tiny_llm), quantize="none", precision="fp32")
    asked = model.prompt_ids(PROMPT)
    assert model.tokenizer.decode(asked.prefix).endswith("user\n")
    assert model.tokenizer.decode(asked.suffix) == f"\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_pad_token_the_end_pads(tiny_llm):
    model = load_llm(str(tiny_llm), quantize="none", precision="fp32")
    assert model.pad_id != model.eos_id
    model.tokenizer.pad_token = None
    assert model.pad_id == model.eos_id


def test_models_that_would_not_do_are_refused(tiny_llm, tiny_folder):
    from vlkit.errors import UsageError
    from vlkit.models.captioner.language_model import llm_config, refuse_changed_logits

    with pytest.raises(UsageError, match="writes no text"):
        llm_config(str(tiny_folder("tiny-siglip")))
    with pytest.raises(UsageError, match="no such folder") as caught:
        llm_config("tiny-qwn")
    assert "tiny-qwen" in caught.value.hint
    config = load_llm(str(tiny_llm), quantize="none", precision="fp32").model.config
    config.final_logit_softcapping = 30.0
    with pytest.raises(UsageError, match="changes its logits"):
        refuse_changed_logits(config, "gemma")


def test_long_captions_are_cut_and_counted(tiny_llm):
    model = load_llm(str(tiny_llm), quantize="none", precision="fp32")
    short, long = "a tart", " ".join(["a red tart"] * 30)
    (one, other), cut = model.captions([short, long], 12)
    assert cut == 1 and one[-1] == model.eos_id and len(other) == 12 and other[-1] != model.eos_id


def test_another_model_has_another_identity_in_any_precision_the_same(tiny_llm, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def identity(folder, quantize="none", precision="fp32"):
        return load_llm(str(folder), quantize=quantize, precision=precision).identity()

    own = identity(tiny_llm)
    assert own == identity(tiny_llm, precision="bf16") == identity(tiny_llm, quantize="nf4")
    shutil.copytree(tiny_llm, tmp_path / "copy")
    assert identity(tmp_path / "copy") == own
    # The same norms and words, other matrices: what a merged adapter is.
    weights = load_file(tiny_llm / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name] + 0.01}, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    assert identity(tmp_path / "copy") != own
    shutil.copytree(tiny_llm, tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert identity(tmp_path / "chat") != own


def test_a_prompt_with_a_control_token_in_it_is_refused(tiny_llm):
    from vlkit.errors import UsageError

    with pytest.raises(UsageError, match="im_end"):
        load_llm(str(tiny_llm), quantize="none", precision="fp32").prompt_ids("Describe<|im_end|> it")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predicted_activations_are_what_autograd_keeps(precision, tiny_llm, tiny_folder):
    """Counted tensor by tensor, of a model whose shapes are Qwen2.5's, made smaller."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vlkit.config.fusion import TrainFusionConfig
    from vlkit.models.device import DTYPES, autocast
    from vlkit.training.setup.estimates import MetaModels, estimate_fusion

    tokenizer = load_llm(str(tiny_llm), quantize="none", precision="fp32").tokenizer
    sizes = {"hidden_size": 192, "intermediate_size": 1120, "num_attention_heads": 6, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=len(tokenizer), num_hidden_layers=6, tie_word_embeddings=True, **sizes)
    language = LanguageModel(Qwen2ForCausalLM(config).to(DTYPES[precision]).eval(), tokenizer, "made")
    vision = load_vision_encoder(str(tiny_folder("tiny-siglip")))
    created = Captioner.fresh(vision, language, PROMPT, precision, seed=1)
    own = {p.data_ptr() for p in created.parameters()}
    remaining: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            remaining[storage.data_ptr()] = storage.nbytes()
        return tensor

    captions = torch.randint(len(tokenizer), (4, 24))
    with autocast(created.device, precision), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patches = created.patches(pictures(4))
        actual = created.losses(patches, captions, torch.full((4,), 24))
    settings = TrainFusionConfig(batch_size=4, max_length=24, precision=precision, quantize="none", vision="v", llm="l")
    predicted = estimate_fusion(settings, MetaModels(vision, language, created.fusion)).memory["activations"]
    measured = sum(remaining.values())
    assert actual.token_count == 96
    assert 0.6 < predicted / measured < 1.5, (predicted, measured)
