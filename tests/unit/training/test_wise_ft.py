"""Between the untouched and the tuned weights: the ends are the two models, and validation decides."""

import pytest
import torch

from vlkit.config.training import TrainRetrievalConfig
from vlkit.models import tuning
from vlkit.training.wise_ft import STRENGTHS, InterpolationPoint, WeightInterpolation, best_point


def moved(encoder, seed=0):
    """Weights that training might have left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.trainable(encoder).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def embedded(encoder):
    encoder.eval()
    with torch.no_grad():
        return encoder.embed_texts(encoder.pad(encoder.tokenize(["red tart", "blue soup", "bread"])[0]))


def test_a_lora_at_a_strength_is_peft_at_that_scale(tiny):
    """Against PEFT's own scaling of the layers, at every strength; the logit scale goes along."""
    encoder = tiny("tiny-clip")
    untouched = embedded(encoder)
    tuning.apply_tuning(encoder, TrainRetrievalConfig(tune="lora", lora_dropout=0.0), seed=0)
    trained = tuning.trainable(encoder)
    sweep, scale = WeightInterpolation(trained), encoder.model.logit_scale.item()
    moved(encoder)
    tuned = {name: p.detach().clone() for name, p in trained.items()}
    layers = [m for m in encoder.model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    for strength in STRENGTHS:
        for name, p in trained.items():
            p.data.copy_(tuned[name])
        for layer in layers:
            layer.scaling["default"] *= strength
        theirs = embedded(encoder)
        for layer in layers:
            layer.scaling["default"] = 2.0  # alpha 16 over rank 8
        sweep.move(tuned, strength)
        assert torch.allclose(embedded(encoder), theirs, atol=1e-6)
        between = (1 - strength) * scale + strength * tuned["logit_scale"].item()
        assert encoder.model.logit_scale.item() == pytest.approx(between, rel=1e-6)
    sweep.move(tuned, 0.0)
    assert torch.allclose(embedded(encoder), untouched, atol=1e-6)


def test_full_weights_are_averaged_and_the_ends_are_exact(tiny):
    encoder = tiny("tiny-siglip")
    tuning.apply_tuning(encoder, TrainRetrievalConfig(tune="full"), seed=0)
    trained = tuning.trainable(encoder)
    before = {name: p.detach().clone() for name, p in trained.items()}
    sweep = WeightInterpolation(trained)
    moved(encoder)
    tuned = {name: p.detach().clone() for name, p in trained.items()}
    observed = []

    def measure():
        strength = STRENGTHS[len(observed)]
        observed.append(strength)
        for name, p in trained.items():
            expected = before[name].double() * (1 - strength) + tuned[name].double() * strength
            assert torch.allclose(p.double(), expected, atol=1e-6)
        return {"text_to_image": {"recall@1": 0.5, "mrr": 0.5}, "image_to_text": {"recall@1": 0.5, "mrr": 0.5}}

    points = sweep.measure(measure, None)
    assert len(points) == 11 and all(torch.equal(p, tuned[name]) for name, p in trained.items())
    sweep.move(tuned, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in trained.items())


def test_validation_decides_and_of_equals_the_one_that_forgot_least():
    def point(strength, recall, mrr, guard=None):
        return InterpolationPoint(strength, {"a": {"recall@1": recall, "mrr": mrr}}, guard)

    assert best_point([point(0.0, 0.1, 0.9), point(0.5, 0.4, 0.5), point(1.0, 0.3, 0.9)]).strength == 0.5
    assert best_point([point(0.0, 0.1, 0.9), point(0.5, 0.4, 0.5), point(1.0, 0.4, 0.6)]).strength == 1.0
    assert best_point([point(0.0, 0.1, 0.9), point(0.5, 0.4, 0.5), point(1.0, 0.4, 0.5)]).strength == 0.5


@pytest.fixture
def guard(vlkit, tmp_path):
    from helpers import write_class_folders

    write_class_folders(tmp_path / "leaves", per_class=6)
    out = tmp_path / "guard"
    assert vlkit("prep", "--domain", "agriculture", "--source", tmp_path / "leaves", "--out", out).code == 0
    return out
