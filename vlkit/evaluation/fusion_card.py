"""The model card of a captioner: README.md of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkit.config.base import yaml_text
from vlkit.runs import Run
from vlkit.storage import write_text


def write_fusion_card(run: Run) -> Path:
    """Write README.md of a finished run."""
    write_text(run.folder / "README.md", fusion_card(run))
    return run.folder / "README.md"


def fusion_card(run: Run) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    settings, facts = run.config(), run.read_json("finished.json")
    best = run.read_json("best.json").get("val", {})
    front = {"library_name": "vlkit", "pipeline_tag": "image-to-text", "tags": ["vlkit", "image-captioning"]}
    data = run.environment().get("data") or {}
    trained = f"{facts.get('trainable_parameters', 0):,} of {facts.get('total_parameters', 0):,} parameters"
    parts = [
        f"---\n{yaml_text(front)}---",
        f"# {run.name}",
        f"{_short(settings['vision'])} and {_short(settings['llm'])} ({settings['quantize']}), both frozen, and "
        f"between them a fusion of {trained} that vlkit trained on {data.get('train', '?')} captions of "
        f"`{Path(str(data.get('path', 'unknown data'))).name}`.",
        f'```\nvlkit caption --run {run.name} picture.jpg\n```\n\n`fusion/` holds what was trained. The prompt is "'
        f'{settings["prompt"]}"',
        f"## Validation\n\n{_validation(best, facts)}",
        "## Limits\n\n- The encoder's and the language model's own limits and licences, and those of the data, hold.\n"
        "- A captioner names what it was taught to name, fluently, also where it is wrong: measure it on your own.",
    ]
    return "\n\n".join(parts) + "\n"


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def _validation(best: dict[str, Any], facts: dict[str, Any]) -> str:
    looking, captions = best.get("looking"), facts.get("captions")
    if not looking or not captions:
        return "There is no validation split."
    rows = [f"| loss with {name} picture, nats a token | {_number(value)} |" for name, value in looking.items()]
    rows += [f"| {name} | {value:.3f} |" for name, value in captions.items()]
    samples = [f'- "{each["caption"]}" (a person: "{each["reference"]}")' for each in best.get("samples", [])[:4]]
    return "\n".join(["| | |", "|---|---|", *rows, "", *samples])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
