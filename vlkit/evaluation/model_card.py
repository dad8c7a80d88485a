"""The model card: README.md of a run, for whoever finds the model without its history.

It is written when a run ends and again when it is measured, from the run's files alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkit.config.base import yaml_text
from vlkit.config.training import TrainRetrievalConfig
from vlkit.evaluation.formatting import (
    format_difference,
    format_direction,
    format_metric,
    format_with_interval,
    retention_sentence,
)
from vlkit.evaluation.results import Results
from vlkit.metrics import metric_names
from vlkit.models.quantization import NOT_QUANTIZED
from vlkit.runs import Run
from vlkit.storage import write_text

NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'
# The settings that decide a result; all are in config.yaml.
DECISIVE = (
    *("model", "text_model", "quantize", "tune", "towers", "trainable", "unfreeze_layers"),
    *("lora_targets", "lora_rank", "lora_alpha", "lora_dropout", "loss", "labels", "batch_size", "grad_accum"),
    *("lr", "head_lr", "logit_lr", "weight_decay", "warmup", "precision", "augment", "negatives", "seed"),
)


def write_card(run: Run) -> Path:
    """Write README.md of a finished run, and one beside the weights that other tools load."""
    for name in ("", *_weight_folders(run)):
        write_text(run.folder / name / "README.md", retrieval_card(run, name))
    return run.folder / "README.md"


def _weight_folders(run: Run) -> list[str]:
    return [name for name in ("model", "adapter") if (run.folder / name).is_dir()]


def write_fusion_card(run: Run) -> Path:
    """Write README.md of a finished captioner."""
    write_text(run.folder / "README.md", fusion_card(run))
    return run.folder / "README.md"


def retrieval_card(run: Run, folder: str = "") -> str:
    """Return the card as Markdown, with the front matter that model hubs read.

    Args:
        folder: of the run, that the card is for: "model", "adapter", or "" for the run itself.
    """
    settings, results = run.config(), Results.read(run.folder / "results.json")
    kind = folder or _weight_folders(run)[0]
    # No hub knows a model that was created here, or one in a local folder.
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
        _loading(run, kind, folder),
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


def _loading(run: Run, kind: str, folder: str) -> str:
    """Return code that loads the weights, for the folder that the card is in: by transformers, and by vlkit."""
    with_vlkit = _code(
        "import vlkit",
        "",
        # An adapter alone is no model: the run knows its base.
        f'encoder = vlkit.load("{".." if folder == "adapter" else "."}")',
        'texts = encoder.encode_texts(["a photo of a tart"])',
        'images = encoder.encode_images(["tart.jpg"])',
        "similarity = images @ texts.T",
    )
    return f"{_loading_by_transformers(run, kind, folder)}\n\nBy vlkit:\n\n{with_vlkit}"


def _loading_by_transformers(run: Run, kind: str, folder: str) -> str:
    here, up = ("." if folder else kind), ("../" if folder else "")
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
    quantized = bool(run.config().get("quantize"))
    quantization = []
    if quantized:
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[run.config()["precision"]]
        quantization = [
            f"quantization = BitsAndBytesConfig({NF4}, bnb_4bit_compute_dtype=torch.{dtype},",
            f"    llm_int8_skip_modules={NOT_QUANTIZED})",
        ]
    return _code(
        *(["import torch"] if quantized else []),
        "from peft import PeftModel",
        f"from transformers import AutoModel, AutoTokenizer{', BitsAndBytesConfig' if quantized else ''}",
        "",
        *quantization,
        f'base = AutoModel.from_pretrained("{base}"{", quantization_config=quantization" if quantized else ""})',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{here}")',
        "# A PEFT adapter holds no logit scale and bias: they are in logit_parameters.safetensors beside it.",
    )


def _loading_pair(here: str, kind: str, base: str) -> str:
    """Return the code for a vision tower and a text encoder of another family, which transformers loads one by one."""
    if kind == "adapter":
        return f"A PEFT adapter on the pair in `{base}/`, with its projections in logit_parameters.safetensors."
    return _code(
        "from transformers import AutoModel, AutoTokenizer",
        "from safetensors.torch import load_file",
        "",
        f'text = AutoModel.from_pretrained("{here}/text", add_pooling_layer=False)',
        f'tokenizer = AutoTokenizer.from_pretrained("{here}/text")',
        f'joint = load_file("{here}/pair.safetensors")',
        "tokens = tokenizer([...], padding=True, return_tensors='pt')",
        "states, mask = text(**tokens).last_hidden_state, tokens['attention_mask'][..., None]",
        f"# Pooled as {here}/pair.json says; here the mean. The vision tower: CLIPVisionModelWithProjection, or",
        f"# SiglipVisionModel, of {here}/vision",
        "embeddings = (states * mask).sum(1) / mask.sum(1) @ joint['text_projection.weight'].T",
    )


def _code(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _results(results: Results | None) -> str:
    if results is None:
        return "Not measured yet: `vlkit eval --run` this folder."
    lines = [
        f"On the {results.data['split']} split, 95 % intervals by resampling units (recipes, patients, images).",
        "",
        "| | metric | untouched | tuned | difference |",
        "|---|---|---|---|---|",
    ]
    for name, group in results.groups.items():
        for metric in metric_names(name, "card"):
            tuned = format_with_interval(metric, group.metrics[metric], group.intervals[metric])
            before = change = ""
            if group.baseline:
                before = format_with_interval(metric, group.baseline[metric], group.baseline_intervals[metric])
                change = format_difference(metric, group.difference[metric])
            lines.append(f"| {format_direction(name)} | {metric} | {before} | {tuned} | {change} |")
    verdicts = [
        f"- {format_direction(name)}: {group.verdict}" for name, group in results.groups.items() if group.verdict
    ]
    return "\n".join([*lines, "", *verdicts])


def _training(run: Run, settings: dict[str, Any]) -> str:
    facts, environment = run.read_json("finished.json"), run.environment()
    trained, total = facts.get("trainable_parameters", 0), facts.get("total_parameters", 0)
    text = f"{trained:,} of {total:,} parameters, {facts.get('train_seconds', 0):.0f} s on {environment.get('device')}."
    text += f" {facts.get('steps')} of at most {settings['steps']} steps; these weights are those of step"
    text += f" {facts.get('exported_step')}."
    if "strength" in facts and settings.get("interpolate"):
        text += (
            f" They are at strength {facts['strength']:g} between the untouched (0) and the tuned weights (1), which"
        )
        text += " is best on validation."
    active = TrainRetrievalConfig.drop_idle(settings)
    decisive = {name: active[name] for name in DECISIVE if active.get(name) not in (None, [], ())}
    fingerprint = (environment.get("data") or {}).get("fingerprint")
    return f"{text} Data fingerprint `{fingerprint}`.\n\n```yaml\n{yaml_text(decisive)}```"


def _limits(run: Run, results: Results | None) -> str:
    share, guard = run.read_json("finished.json").get("retained"), run.config().get("guard")
    if results is not None and results.retention is not None and results.retention.retained is not None:
        share, guard = results.retention.retained, results.retention.data["path"]
    forgotten = "What it has forgotten of other domains was not measured."
    if share is not None:
        sentence = retention_sentence(share, f"`{Path(str(guard)).name}`")
        forgotten = f"{sentence[0].upper()}{sentence[1:]}."
    lines = [f"- It was tuned for one domain. {forgotten}"]
    if results is not None:
        counts = results.groups["text_to_image"].metrics
        size = f"{counts['queries']} texts against {counts['gallery']} images"
        lines.append(f"- Measured on {size}: recall falls as the gallery grows.")
    lines.append("- The untouched model's own limits and licence, and those of the data, still hold.")
    return "\n".join(lines)


def fusion_card(run: Run) -> str:
    """Return the card of a captioner as Markdown, with the front matter that model hubs read."""
    settings, facts = run.config(), run.read_json("finished.json")
    best = run.read_json("best.json").get("val", {})
    front = {"library_name": "vlkit", "pipeline_tag": "image-to-text", "tags": ["vlkit", "image-captioning"]}
    data = run.environment().get("data") or {}
    trained = f"{facts.get('trainable_parameters', 0):,} of {facts.get('total_parameters', 0):,} parameters"
    parts = [
        f"---\n{yaml_text(front)}---",
        f"# {run.name}",
        f"{_short(settings['vision'])} and {_short(settings['llm'])} ({settings['quantize']}), both frozen, joined by "
        f"a fusion of {trained} that vlkit trained on {data.get('train', '?')} captions of "
        f"`{Path(str(data.get('path', 'unknown data'))).name}`.",
        f"```\nvlkit caption --run {run.name} image.jpg\n```\n\n`fusion/` holds the trained weights. The prompt is "
        f'"{settings["prompt"]}"',
        f"## Validation\n\n{_fusion_validation(best, facts)}",
        "## Limits\n\n- The encoder's and the language model's own limits and licences, and those of the data, hold.\n"
        "- A captioner writes what it was trained to write, fluently, even where it is wrong: measure it on your data.",
    ]
    return "\n\n".join(parts) + "\n"


def _fusion_validation(best: dict[str, Any], facts: dict[str, Any]) -> str:
    reliance, captions = best.get("looking"), facts.get("captions")
    if not reliance or not captions:
        return "There is no validation split."
    losses = [
        f"| loss with {name} image, nats a token | {format_metric('', value)} |" for name, value in reliance.items()
    ]
    metrics = [f"| {name} | {value:.3f} |" for name, value in captions.items()]
    samples = [f'- "{row["caption"]}" (a person: "{row["reference"]}")' for row in best.get("samples", [])[:4]]
    return "\n".join(["| | |", "|---|---|", *losses, *metrics, "", *samples])
