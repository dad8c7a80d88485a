"""Texts end to end against the same texts padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.config.training import TrainRetrievalConfig
from vlkit.models import stages, tuning
from vlkit.models.device import autocast
from vlkit.models.fast import layers, packing
from vlkit.models.fast.packing import Packing


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_what_is_packed_is_the_text_and_comes_back_to_its_place(lengths, more, seed):
    length = max(lengths) + more
    packed_as = Packing.of(torch.tensor(lengths) - 1, length)
    if packed_as is None:
        assert packing._rounded(sum(lengths)) >= (1 - packing.WORTH) * len(lengths) * length
        return
    padded = torch.randn(len(lengths), length, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    packed = packed_as.pack(padded)
    texts = [padded[n, :count] for n, count in enumerate(lengths)]
    kept = packed_as.flat
    assert torch.equal(packed[0], padded.flatten(0, 1)[kept])
    assert set(kept.tolist()) >= {n * length + at for n, count in enumerate(lengths) for at in range(count)}
    assert len(kept) == packing._rounded(sum(lengths)) < len(lengths) * length and (kept.diff() > 0).all()
    assert torch.equal(packed[0, packed_as.last], torch.stack([text[-1] for text in texts]))
    again = packed_as.unpack(packed)
    assert all(torch.equal(again[n, :count], text) for n, (count, text) in enumerate(zip(lengths, texts, strict=True)))
    # A gradient that is zero at the padding comes back as it is, through both.
    given_ = torch.randn(again.shape, generator=torch.Generator().manual_seed(seed + 1))
    for n, count in enumerate(lengths):
        given_[n, count:] = 0
    again.backward(given_)
    assert torch.equal(padded.grad, given_)


def test_numbers_of_tokens_are_few_and_near():
    rounded = [packing._rounded(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= each <= tokens * 17 / 16 for tokens, each in enumerate(rounded, 1))
    assert len({each for each in rounded if 256 < each <= 512}) == 16
    assert rounded == sorted(rounded)


def test_nothing_is_packed_where_there_is_little_padding_or_no_text():
    assert Packing.of(torch.zeros(0, dtype=torch.long), 5) is None
    assert Packing.of(torch.tensor([4, 4, 4]), 5) is None
    assert Packing.of(torch.tensor([4, 4, 1]), 5) is not None
    # 129 tokens in 136 places would be rounded to all of them.
    assert Packing.of(torch.tensor([16] * 7 + [9]), 17) is None


TEXTS = ["a red soup", "bread", "a green pie with salt, pepper, lemon and a little sugar on top of it", "cake", "tea"]


def embedded(encoder, precision, monkeypatch, whole):
    """Embeddings and gradients, packed or padded."""
    monkeypatch.setattr(packing, "WORTH", 2.0 if whole else 0.05)
    asked = []
    of = Packing.of
    monkeypatch.setattr(stages.Packing, "of", lambda *told: asked.append(of(*told)) or asked[-1])
    ids = encoder.pad(encoder.tokenize(TEXTS)[0])
    encoder.zero_grad()
    torch.manual_seed(0)
    with autocast(torch.device("cpu"), precision):
        found = encoder.embed_texts(ids)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    monkeypatch.undo()
    assert {each is None for each in asked} == {whole}
    return found.detach(), {name: p.grad.clone() for name, p in tuning.trainable(encoder).items() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{}, {"tune": "text", "checkpoint_activations": True}, {"tune": "lora", "lora_dropout": 0.0}]
)
def test_embeddings_and_gradients_are_those_of_padded_texts(settings, precision, tiny, monkeypatch):
    encoder = tiny("tiny-clip")
    tuning.apply_tuning(encoder, TrainRetrievalConfig(**settings), seed=0)
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    tuning.train_mode(encoder)
    (packed, ours), (padded, exact) = (embedded(encoder, precision, monkeypatch, whole) for whole in (False, True))
    near = 1e-5 if precision == "fp32" else 2e-2
    assert (packed - padded).norm() / padded.norm() < near
    assert ours.keys() == exact.keys() and len(ours) > 4
    off = sum((ours[name] - exact[name]).square().sum() for name in exact).sqrt()
    assert off / sum(each.square().sum() for each in exact.values()).sqrt() < near


def test_a_tower_that_is_cut_anywhere_goes_on_as_if_it_had_not_been(tiny):
    encoder = tiny("tiny-clip")
    ids = encoder.pad(encoder.tokenize(TEXTS)[0])
    begun, chain = stages.PartialForward(ids, 0, encoder.ends(ids)), encoder.text_chain
    with torch.no_grad():
        whole = stages.run_stages(chain, begun).values
        for depth in range(len(chain) + 1):
            assert torch.allclose(
                stages.run_stages(chain, stages.run_stages(chain, begun, depth)).values, whole, atol=1e-6
            )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_of_attention_falls_on_packed_texts_as_on_padded_ones(precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    query, key, value = torch.randn(3, 4, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed_as = Packing.of(torch.tensor([8, 2, 4, 1]), 9)
    packed = [packed_as.pack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value)]
    options = {"dropout": 0.5, "is_causal": True, "scaling": 8**-0.5}
    module = torch.nn.Module()
    torch.manual_seed(1)
    found, _ = layers.attention(module, *packed, None, packed_as, **options)
    torch.manual_seed(1)
    exact = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, is_causal=True).transpose(1, 2)
    without = layers.attention(module, *packed, None, packed_as, **{**options, "dropout": 0.0})[0]
    at = torch.arange(9) <= packed_as.ends[:, None]
    near = 1e-6 if precision == "fp32" else 0.05  # A value that fell out is 0 in one and 2 x in the other.
    assert torch.allclose(packed_as.unpack(found)[at], exact[at], atol=near)
    assert (found - without).norm() > 0.2 * without.norm(), "it was drawn"


def test_dropout_of_adapters_on_packed_texts_is_drawn_again_where_activations_are(tiny, monkeypatch):
    found = []
    for again in (False, True):
        clip = tiny("tiny-clip")
        config = TrainRetrievalConfig(tune="lora", lora_dropout=0.3, checkpoint_activations=again)
        tuning.apply_tuning(clip, config, seed=0)
        for name, parameter in clip.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        tuning.train_mode(clip)
        found.append(embedded(clip, "fp32", monkeypatch, whole=False))
        clip.eval()
        still = embedded(clip, "fp32", monkeypatch, whole=False)[0]
        assert (found[-1][0] - still).norm() > 0.01 * still.norm(), "it was drawn"
    (plain, gradients), (recomputed, same) = found
    assert torch.equal(plain, recomputed) and gradients.keys() == same.keys() and len(same) > 4
    assert all(torch.equal(gradients[name], same[name]) for name in same)


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_another_attention_is_not_packed_and_gives_the_same_numbers(other, tiny):
    """Chosen after loading, in the text tower alone or everywhere."""
    clip = tiny("tiny-clip")
    ids = clip.pad(clip.tokenize(TEXTS)[0])
    with torch.no_grad():
        exact = clip.embed_texts(ids)
        assert any(stage.packs for stage in clip.text_chain)
        clip.model.text_model.set_attn_implementation(other)
        assert not any(stage.packs for stage in clip.text_chain)
        assert torch.allclose(clip.embed_texts(ids), exact, atol=1e-6)
        clip.model.set_attn_implementation(other)
        assert torch.allclose(clip.embed_texts(ids), exact, atol=1e-6)


def test_other_towers_are_not_packed(tiny):
    assert not any(stage.packs for stage in tiny("tiny-siglip").text_chain)
