"""The model card says what the run's files say."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vlkit.models.loading import load_exported


@pytest.fixture(scope="module")
def merged(prepared, tmp_path_factory, vlkit):
    """A LoRA run, merged and measured."""
    runs = tmp_path_factory.mktemp("cards")
    train = ("train-retrieval", "--data", prepared, "--model", "tiny-clip", "--tune", "lora", "--merge", "--steps", 3)
    assert vlkit(*train, "--runs-dir", runs, "--name", "mine", "--batch-size", 8).code == 0
    assert "Not measured yet" in (runs / "mine/README.md").read_text()
    assert vlkit("eval", "--run", runs / "mine").code == 0
    return runs / "mine"


def test_the_card_has_the_results_with_their_intervals(merged):
    text, results = (merged / "README.md").read_text(), json.loads((merged / "results.json").read_text())
    for direction, metrics in results["metrics"].items():
        value, (low, high) = metrics["recall@5"], results["intervals"][direction]["recall@5"]
        before = results["baseline"][direction]["recall@5"]
        row = next(
            line for line in text.splitlines() if direction.replace("_to_", " -> ") in line and "recall@5" in line
        )
        assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in row and f"{before:.3f} [" in row
        assert results["verdict"][direction] in text


def test_the_front_matter_and_the_settings_are_yaml(merged):
    text, settings = (merged / "README.md").read_text(), yaml.safe_load((merged / "config.yaml").read_text())
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front, "made here: no hub knows it"
    assert front["library_name"] == "transformers"
    report = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert report == {key: settings[key] for key in report}
    assert {"lora_rank", "loss", "labels", "seed", "lr"} <= report.keys() and "unfreeze_layers" not in report
    adapter = yaml.safe_load((merged / "adapter/README.md").read_text().split("---")[1])
    assert (adapter["library_name"], "lora" in adapter["tags"]) == ("peft", True)
    facts = json.loads((merged / "finished.json").read_text())
    assert f"3 of at most 3 steps; these weights are those of step {facts['exported_step']}." in text


@pytest.mark.parametrize("kind", ["run", "model", "adapter"])
def test_its_lines_of_python_load_the_model(kind, merged, tmp_path, monkeypatch):
    run = shutil.copytree(merged, tmp_path / "run")
    place = {"run": "", "model": "model", "adapter": "adapter"}[kind]
    by_transformers, by_vlkit = re.findall(r"```python\n(.*?)```", (run / place / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run / place)
    names: dict = {}
    exec(by_transformers, names)
    ids = torch.tensor([names["tokenizer"]("a tart")["input_ids"]])
    with torch.no_grad():
        actual = names["model"].get_text_features(input_ids=ids).pooler_output
        expected = load_exported(merged, "").embed_texts(ids)
    assert torch.allclose(torch.nn.functional.normalize(actual, dim=1), expected, atol=1e-5)
    Image.new("RGB", (40, 40), "red").save("tart.jpg")
    exec(by_vlkit, names)
    assert names["similarity"].shape == (1, 1)
    assert np.allclose(names["encoder"].encode_texts(["a tart"]), expected.numpy(), atol=1e-4)
