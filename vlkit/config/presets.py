"""Presets of models and domains, laid under what the user gave.

Precedence: default < model preset < domain preset < YAML < flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkit.config.base import Settings, read_yaml
from vlkit.config.data import TINY_LLM, TINY_MODELS, AugmentConfig, ImageAugmentSettings, PrepConfig
from vlkit.config.fusion import TrainFusionConfig
from vlkit.config.training import TrainRetrievalConfig
from vlkit.errors import UsageError, suggest_name
from vlkit.storage import Location

SECTIONS: dict[str, type[Settings]] = {
    "prep": PrepConfig,
    "augment": AugmentConfig,
    "train-retrieval": TrainRetrievalConfig,
}


def model_preset(model: str, text_model: str | None = None) -> dict[str, Any]:
    """Return the settings that suit a model: tiny ones start from scratch and need other rates than pretrained ones.

    A text encoder of another family learns the image tower's space, which stays as it is; its projection is new.
    """
    if text_model is not None and model not in TINY_MODELS:
        return {"tune": "text", "epochs": 3.0, "batch_size": 32, "lr": 2e-5, "head_lr": 1e-3}
    if model in TINY_MODELS:
        return {"tune": "full", "steps": 1000, "batch_size": 64, "lr": 1.5e-3, "warmup": 0.3}
    return {"epochs": 3.0, "batch_size": 32}


def domain_preset(domain: str, command: str) -> dict[str, Any]:
    """Return the section of a domain's YAML for `command`, one of SECTIONS.

    Raises:
        UsageError: there is no such domain, or its YAML has a section that no command reads.
    """
    shipped = {path.stem: path for path in (Path(__file__).parent / "domains").glob("*.yaml")}
    path = Path(domain) if domain.endswith((".yaml", ".yml")) else shipped.get(domain)
    if path is None:
        raise UsageError(f"unknown domain {domain!r}", hint=suggest_name(domain, sorted(shipped)))
    sections = read_yaml(path)
    for section, config in SECTIONS.items():
        config.check_keys(sections.get(section) or {}, f"{path}, section {section}")
    if unknown := set(sections) - SECTIONS.keys():
        raise UsageError(f"{path}: unknown section {sorted(unknown)[0]!r}", hint=f"known: {', '.join(SECTIONS)}")
    return dict(sections.get(command) or {})


def resolve_prep(given: Mapping[str, Any]) -> PrepConfig:
    """Return PrepConfig from what was given on the command line and in YAML, over the domain's preset, if any."""
    domain = str(given["domain"]) if given.get("domain") else None
    if domain is None and not given.get("source"):
        hint = "for example: vlkit prep --domain recipes --source raw/; with --source alone the layout is detected"
        raise UsageError("prep needs --domain NAME or --source DIR", hint=hint)
    config = PrepConfig.from_layers(domain_preset(domain, "prep") if domain else {}, given)
    trained = domain_preset(domain, "train-retrieval") if domain else {}
    model = config.model or trained.get("text_model") or trained.get("model")
    name = Path(domain).stem if domain else Path(config.source.name).stem
    return dataclasses.replace(config, out=config.out or Location(Path("data") / name), model=model)


def resolve_augment(given: Mapping[str, Any]) -> AugmentConfig:
    """Return AugmentConfig over the preset of the data's domain."""
    data = Location(given["data"] if given.get("data") else only_prepared_folder())
    layers = _augment_layers(_domain_of(data), given)
    return AugmentConfig.from_layers(*layers, {**given, "data": data})


def _augment_layers(domain: str | None, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the layers under what the user gave; operations that the domain forbids get probability 0.

    Raises:
        UsageError: the user gave one of them a probability.
    """
    preset = domain_preset(domain, "augment") if domain else {}
    forbid = given.get("forbid") if given.get("forbid") is not None else preset.get("forbid")
    fields = AugmentConfig.fields()
    forbidden = fields["forbid"].read(forbid or (), "")
    for name in forbidden:
        if name in fields and float(given.get(name) or 0) > 0:
            message = f"{fields[name].flag} is forbidden: it falsifies the images of {domain or 'this domain'}"
            raise UsageError(message, hint="leave it out; if it does no harm, set forbid: [] beside it")
    return preset, dict.fromkeys(set(forbidden) & fields.keys(), 0.0)


def _image_augment_settings(value: Any, domain: str | None, seed: Any) -> ImageAugmentSettings | None:
    """Return --augment FILE, or a snapshot's mapping, over the domain's preset; the seed is the run's by default."""
    if value is None or isinstance(value, ImageAugmentSettings):
        return value
    source = "augment" if isinstance(value, Mapping) else str(value)
    given = dict(value) if isinstance(value, Mapping) else read_yaml(Path(value))
    AugmentConfig.check_keys(given, source)
    fields = ImageAugmentSettings.fields()
    given = {name: value for name, value in given.items() if name in fields and value is not None}
    given = {name: fields[name].read(value, source) for name, value in given.items()}
    layers = [{key: value for key, value in layer.items() if key in fields} for layer in _augment_layers(domain, given)]
    seeded = {} if seed is None else {"seed": seed}
    return ImageAugmentSettings.from_layers(*layers, seeded, given, source=source)


def resolve_train_retrieval(given: Mapping[str, Any]) -> TrainRetrievalConfig:
    """Return TrainRetrievalConfig over the presets of the data's domain and of the model.

    A domain's preset belongs to the model it names: with another --model its rates would be wrong, so it is left out.

    Raises:
        UsageError: a given setting has no effect with the others.
    """
    given = dict(given)
    data = Location(given["data"] if given.get("data") else only_prepared_folder())
    given["data"] = data
    domain = _domain_of(data)
    preset = domain_preset(domain, "train-retrieval") if domain else {}
    given["augment"] = _image_augment_settings(given.get("augment"), domain, given.get("seed"))
    named = given.get("model") or (given.get("init_from") and _base_model_name(Path(str(given["init_from"]))))
    model = str(named or preset.get("model") or TrainRetrievalConfig.model)
    if preset.get("model", model) != model:
        preset = {}
    text_model = given.get("text_model") or preset.get("text_model")
    layers = [model_preset(model, text_model), preset]
    if text_model and given.get("tune") == "lora":
        # The presets' rate is that of a whole encoder.
        layers = [{key: value for key, value in layer.items() if key != "lr"} for layer in layers]
    config = TrainRetrievalConfig.from_layers(*layers, given)
    config.refuse_idle()
    return config


# For a language model that vlkit makes itself: small batches and slow rates are for large ones.
TINY_FUSION = {"quantize": "none", "batch_size": 32, "grad_accum": 1, "lr": 2e-3, "steps": 600}


def resolve_train_fusion(given: Mapping[str, Any]) -> TrainFusionConfig:
    """Return TrainFusionConfig over the preset of the language model.

    Without --data it is data/coco, or the only prepared folder.

    Raises:
        UsageError: a given setting has no effect with the others.
    """
    given, coco = dict(given), Path("data") / "coco"
    given["data"] = Location(given["data"] if given.get("data") else coco if coco.is_dir() else only_prepared_folder())
    preset = TINY_FUSION if given.get("llm") == TINY_LLM else {"steps": 1200}
    config = TrainFusionConfig.from_layers(preset, given)
    config.refuse_idle()
    return config


def _base_model_name(run: Path) -> str | None:
    """Return the base model of a run, for its presets; None where the folder names none."""
    snapshot = run / "config.yaml"
    return read_yaml(snapshot).get("model") if snapshot.is_file() else None


def _domain_of(data: Location) -> str | None:
    """Return the domain that a prepared folder was made with, if it still exists."""
    from vlkit.remote import ZONE_TABLES, local_folder

    folder = local_folder(data)
    paths = (folder / "data.yaml", folder / ZONE_TABLES / "data.yaml")
    metadata = next((path for path in paths if path.is_file()), None)
    settings = read_yaml(metadata).get("settings") if metadata else None
    domain = settings.get("domain") if isinstance(settings, dict) else None
    gone = str(domain).endswith((".yaml", ".yml")) and not Path(str(domain)).is_file()
    return str(domain) if domain and not gone else None


def only_prepared_folder(root: Path = Path("data")) -> Path:
    """Return the one prepared folder under data/, for commands called without --data.

    Raises:
        UsageError: there is none, or more than one.
    """
    folders = sorted(path.parent for path in root.glob("*/pairs.*") if not path.parent.name.startswith("."))
    if len(folders) == 1:
        return folders[0]
    if not folders:
        hint = "prepare one: vlkit prep --domain recipes --source raw/"
        raise UsageError(f"no --data, and no prepared folder under {root}/", hint=hint)
    message = f"no --data, and {len(folders)} prepared folders under {root}/: {', '.join(map(str, folders))}"
    raise UsageError(message, hint=f"name one: --data {folders[0]}")
