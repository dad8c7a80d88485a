"""--quantize nf4: a run in four bits is measured in four bits, and what cannot be is refused."""

import pytest

from vlkit.models import loading


def four_bit(created):
    return {name: m for name, m in created.model.named_modules() if type(m).__name__ == "Linear4bit"}


def test_a_run_in_four_bits_is_measured_in_four_bits(prepared, trained, vlkit, tmp_path):
    """On a trained base: eval finds the validation that the run said, and the untouched model is the whole one."""
    base = ("train-retrieval", "--data", prepared, "--model", trained / "model", "--runs-dir", tmp_path, "--name", "q")
    flags = ("--tune", "lora", "--quantize", "nf4", "--steps", 4, "--batch-size", 16, "--lr", 1e-2)
    outcome = vlkit(*base, *flags, "--json")
    assert outcome.code == 0, outcome.err
    output = vlkit("eval", "--run", tmp_path / "q", "--split", "val", "--json").json()
    assert output["metrics"]["text_to_image"]["mrr"] == pytest.approx(
        outcome.json()["validation"]["text_to_image"]["mrr"]
    )
    assert four_bit(loading.load_model(str(tmp_path / "q")))
    from vlkit.runs import Run

    assert not four_bit(loading.load_base(Run(tmp_path / "q")))
    counts = outcome.json()["total_parameters"], outcome.json()["trainable_parameters"]
    whole = vlkit(*base[:-1], "whole", *flags[:2], *flags[4:], "--json").json()
    assert counts == (whole["total_parameters"], whole["trainable_parameters"])


def test_what_cannot_be_in_four_bits_is_refused(prepared, vlkit):
    base = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--quantize", "nf4")
    assert "--tune lora" in vlkit(*base).err
    assert "--merge" in vlkit(*base, "--tune", "lora", "--merge").err
    assert "--text-model" in vlkit(*base, "--tune", "lora", "--text-model", "tiny-xlmr").err
    plain = vlkit(*base[:-2], "--tune", "lora", "--dry-run", "--json").json()
    assert vlkit(*base, "--tune", "lora", "--dry-run", "--json").json()["memory_gb"] < plain["memory_gb"]
