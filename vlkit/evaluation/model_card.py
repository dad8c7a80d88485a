"""The model card: README.md of a run, for whoever finds the model without its story.

It is written when a run ends and again when it is measured; it says nothing that does not stand in the run's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkit.config.base import yaml_text
from vlkit.config.training import TrainRetrievalConfig
from vlkit.evaluation.retrieval.retention import retention_sentence
from vlkit.evaluation.summary import format_direction, format_with_interval
from vlkit.metrics import DIRECTIONS
from vlkit.models.quantization import SPARED
from vlkit.runs import Run
from vlkit.storage import write_text

RETRIEVAL = ("recall@1", "recall@5", "recall@10", "mrr")
SHOWN = {**dict.fromkeys(DIRECTIONS, RETRIEVAL), "classification": ("accuracy", "top1_of_10", "f1_macro")}
# What decides a result; the rest stands in config.yaml.
TOLD = (
    *("model", "text_model", "quantize", "tune", "towers", "trainable", "unfreeze_layers"),
    *("lora_targets", "lora_rank", "lora_alpha", "lora_dropout", "loss", "labels", "batch_size", "grad_accum"),
    *("lr", "head_lr", "logit_lr", "weight_decay", "warmup", "precision", "augment", "negatives", "seed"),
)


def write_card(run: Run) -> Path:
    """Write README.md of a finished run, and beside the weights that other tools load."""
    for name in ("", *_weights(run)):
        write_text(run.folder / name / "README.md", card(run, name))
    return run.folder / "README.md"


def _weights(run: Run) -> list[str]:
    return [name for name in ("model", "adapter") if (run.folder / name).is_dir()]


def card(run: Run, place: str = "") -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        place: the folder of the run that it is for: "model", "adapter", or the run itself.
    """
    settings, results = run.config(), run.read_json("results.json")
    kind = place or _weights(run)[0]
    # A model that was made here, or lies in somebody's folder, is none that a hub knows.
    known = {} if run.base.is_dir() or Path(settings["model"]).is_absolute() else {"base_model": settings["model"]}
    front = known | {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["vlkit", "image-text-retrieval", *(["lora"] if kind == "adapter" else [])],
    }
    parts = [
        f"---\n{yaml_text(front)}---",
        f"# {run.name}",
        f"{_short(settings['model'])}, adapted to {_data(run)} by vlkit {_version(run)}.",
        _loading(run, kind, place),
        f"## Results\n\n{_results(results)}",
        f"## Training\n\n{_training(run, settings)}",
        f"## Limits\n\n{_limits(run, results)}",
    ]
    return "\n\n".join(parts) + "\n"


def _version(run: Run) -> str:
    return str((run.environment().get("versions") or {}).get("vlkit", "(unknown)"))


def _data(run: Run) -> str:
    data = run.environment().get("data") or {}
    return f"`{Path(str(data.get('path', 'unknown data'))).name}` ({data.get('train', '?')} training pairs)"


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def _loading(run: Run, kind: str, place: str) -> str:
    """Lines that load the weights, called from the folder that the card is in."""
    here, up = ("." if place else kind), ("../" if place else "")
    base = f"{up}base" if run.base.is_dir() else str(run.config()["model"])
    if run.config().get("text_model"):
        return _loading_pair(here, kind, base)
    if kind == "model":
        return _code(
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f'model = AutoModel.from_pretrained("{here}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")',
        )
    packed = ["import torch"] if run.config().get("quantize") else []
    more = ""
    if packed:
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[run.config()["precision"]]
        packed.append(f"how = BitsAndBytesConfig({NF4}, bnb_4bit_compute_dtype=torch.{dtype},")
        packed.append(f"    llm_int8_skip_modules={SPARED})")
        more = ", quantization_config=how"
    return _code(
        *packed[:1],
        "from peft import PeftModel",
        f"from transformers import AutoModel, AutoTokenizer{', BitsAndBytesConfig' if packed else ''}",
        "",
        *packed[1:],
        f'base = AutoModel.from_pretrained("{base}"{more})',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{here}")',
        "# logit_parameters.safetensors beside the adapter holds what no PEFT adapter does: logit scale and bias",
    )


NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'


def _loading_pair(here: str, kind: str, base: str) -> str:
    """The same for a vision tower and a text encoder of another family, whose halves transformers opens one by one."""
    if kind == "adapter":
        told = f"A PEFT adapter on the pair in `{base}/`, with what joins the halves in logit_parameters.safetensors."
        return told + "\n\n" + _code("from vlkit.models.opening import open_trained", "", 'pair = open_trained(".")')
    return _code(
        "from transformers import AutoModel, AutoTokenizer",
        "from safetensors.torch import load_file",
        "",
        f'text = AutoModel.from_pretrained("{here}/text", add_pooling_layer=False)',
        f'tokenizer = AutoTokenizer.from_pretrained("{here}/text")',
        f'joint = load_file("{here}/pair.safetensors")',
        "tokens = tokenizer([...], padding=True, return_tensors='pt')",
        "states, mask = text(**tokens).last_hidden_state, tokens['attention_mask'][..., None]",
        f"# pooled as {here}/pair.json says; here the mean. The pictures' half: CLIPVisionModelWithProjection, or",
        f"# SiglipVisionModel, of {here}/vision",
        "embeddings = (states * mask).sum(1) / mask.sum(1) @ joint['text_projection.weight'].T",
    )


def _code(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _results(results: dict[str, Any]) -> str:
    if not results.get("metrics"):
        return "Not measured yet: `vlkit eval --run` this folder."
    split, baseline = results["data"]["split"], results.get("baseline") or {}
    lines = [f"On the {split} split, 95 % intervals by resampling units (recipes, patients, pictures).", ""]
    lines += ["| | metric | untouched | tuned | difference |", "|---|---|---|---|---|"]
    for direction in (group for group in SHOWN if group in results["metrics"]):
        for name in SHOWN[direction]:
            tuned = format_with_interval(
                name, results["metrics"][direction][name], results["intervals"][direction][name]
            )
            before = change = ""
            if baseline:
                before = format_with_interval(
                    name, baseline[direction][name], results["baseline_intervals"][direction][name]
                )
                apart = results["difference"][direction][name]
                change = format_with_interval(name, apart["value"], (apart["low"], apart["high"]), sign="+")
            lines.append(f"| {format_direction(direction)} | {name} | {before} | {tuned} | {change} |")
    lines += [
        "",
        *(f"- {format_direction(direction)}: {told}" for direction, told in results.get("verdict", {}).items()),
    ]
    return "\n".join(lines)


def _training(run: Run, settings: dict[str, Any]) -> str:
    facts, environment = run.read_json("finished.json"), run.environment()
    trained, total = facts.get("trainable_parameters", 0), facts.get("total_parameters", 0)
    told = f"{trained:,} of {total:,} parameters, {facts.get('train_seconds', 0):.0f} s on {environment.get('device')}."
    told += f" {facts.get('steps')} of at most {settings['steps']} steps; these weights are those of step"
    told += f" {facts.get('exported_step')}."
    if "strength" in facts:
        between = f"strength {facts['strength']:g} between the untouched (0) and the tuned weights (1)"
        told += f" They are at {between}, as validation prefers." if settings.get("interpolate") else ""
    active = TrainRetrievalConfig.drop_idle(settings)
    kept = {name: active[name] for name in TOLD if active.get(name) not in (None, [], ())}
    fingerprint = (environment.get("data") or {}).get("fingerprint")
    return f"{told} Data fingerprint `{fingerprint}`.\n\n```yaml\n{yaml_text(kept)}```"


def _limits(run: Run, results: dict[str, Any]) -> str:
    forgotten = "What it has forgotten of others was not measured."
    share, guard = run.read_json("finished.json").get("retained"), run.config().get("guard")
    if (kept := results.get("retention") or {}).get("retained") is not None:
        share, guard = kept["retained"], kept["data"]["path"]
    if share is not None:
        told = retention_sentence(share, f"`{Path(str(guard)).name}`")
        forgotten = told[0].upper() + told[1:] + "."
    lines = [f"- It was tuned for one domain. {forgotten}"]
    if results.get("metrics"):
        sizes = results["metrics"]["text_to_image"]
        lines.append(f"- Measured on {sizes['queries']} texts against {sizes['gallery']} pictures: recall falls as the")
        lines[-1] += " gallery grows."
    lines.append("- The untouched model's own limits and licence, and those of the data, still hold.")
    return "\n".join(lines)
