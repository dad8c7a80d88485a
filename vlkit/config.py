"""Every setting of every command, written once.

One flat frozen dataclass per command. The command line's flags (`flags.py`), the keys of a YAML file and the snapshot
in a run folder all come from its fields: a name, a type, a help text, a default. Where the default is None the value
depends on the data or the model and is filled in before the work starts, so that a snapshot is always complete.

Precedence: default < model preset < domain preset < YAML < flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vlkit.errors import UsageError
from vlkit.settings import POSITIONAL, REPEATED, Settings

TINY_MODELS = ("tiny-siglip", "tiny-clip")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """`vlkit sample`."""

    layout: Annotated[Literal["recipes", "agriculture"], "raw layout to write", POSITIONAL]
    out: Annotated[Path, "folder to write to", POSITIONAL]
    seed: Annotated[int, "same seed, same bytes"] = 42

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class PrepConfig(Settings):
    """`vlkit prep`."""

    domain: Annotated[str, "a shipped domain (recipes, agriculture) or a YAML file of your own"]
    source: Annotated[Path, "raw folder"] = Path("raw")
    out: Annotated[Path | None, "prepared folder (default: data/<domain>)"] = None
    layout: Annotated[Literal["recipes", "class-folders"], "how the raw folder is laid out"] = "class-folders"
    table: Annotated[str, "name of the table in the raw folder (recipes)"] = "recipes.jsonl"
    image_root: Annotated[Path | None, "folder that picture paths are relative to (default: the source)"] = None
    image_column: Annotated[str, "field that names the pictures"] = "images"
    text_column: Annotated[tuple[str, ...], "fields that become texts, each value a text of its own"] = ("title",)
    group_column: Annotated[str, "field whose equal values are matches; also the group's name in the CSV views"] = (
        "class_name"
    )
    templates: Annotated[
        tuple[str, ...], "caption of a class folder, with {class_name}; give it again for more", REPEATED
    ] = ("a photo of {class_name}",)
    test_share: Annotated[float, "share of the units held out for the test"] = 0.1
    val_share: Annotated[float, "share of the units that remain after the test, held out for validation"] = 0.1
    stratify: Annotated[bool, "split every class in the same shares"] = False
    limit: Annotated[int | None, "keep about this many pairs (whole units, drawn by the seed)"] = None
    seed: Annotated[int, "decides the split"] = 42

    def __post_init__(self) -> None:
        _between(self, 0.0, 0.9, "test_share", "val_share")
        _at_least(self, 1, "limit")
        if not (self.templates if self.layout == "class-folders" else self.text_column):
            raise UsageError("nothing to make texts from: --templates or --text-column is empty")
        for template in self.templates:
            if "{class_name}" not in template:
                told = f"the template {template!r} would caption every class alike: it has no {{class_name}}"
                raise UsageError(told, hint='for example: --templates "a photo of {class_name}, a type of leaf"')


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """What every trainer has."""

    data: Annotated[Path | None, "prepared folder (default: the only one under data/)"] = None
    name: Annotated[str | None, "name of the run (default: date, time, command and data)"] = None
    runs_dir: Annotated[Path, "folder of the runs"] = Path("runs")
    steps: Annotated[int | None, "optimizer steps"] = None
    epochs: Annotated[float | None, "passes over the training rows, instead of --steps"] = None
    batch_size: Annotated[
        int | None, "pairs a batch: what is contrasted with each other (default: by model, at most all rows)"
    ] = None
    grad_accum: Annotated[int, "batches whose gradients make one step"] = 1
    lr: Annotated[float | None, "peak learning rate (default: 1e-5, LoRA 1e-4, by preset)"] = None
    weight_decay: Annotated[float, "AdamW's, on matrices only"] = 0.01
    warmup: Annotated[float, "steps of linear warm-up; below 1: share of all steps"] = 0.05
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, "of the matrix products (default: what the device does best)"
    ] = None
    seed: Annotated[int, "decides order, initial weights and dropout"] = 42
    workers: Annotated[
        int | None, "processes that load batches (default: by size of the data); never changes a result"
    ] = None
    eval_every: Annotated[int | None, "steps between evaluations on validation (default: a tenth of all)"] = None
    save_every: Annotated[int | None, "steps between checkpoints (default: as --eval-every)"] = None
    keep: Annotated[int, "newest checkpoints to keep, beside the best"] = 2
    limit: Annotated[int | None, "use about this many rows of each split, drawn by the seed"] = None
    deterministic: Annotated[bool, "torch's deterministic algorithms only"] = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "grad_accum", "eval_every", "save_every", "keep", "limit")
        _at_least(self, 0, "workers", "weight_decay", "warmup", "seed")
        _above(self, 0, "epochs", "lr", "max_grad_norm")
        if self.batch_size is not None and self.batch_size < 2:
            raise UsageError(
                f"--batch-size {self.batch_size}: a batch of one contrasts a pair with nothing",
                hint="give it at least 2",
            )
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise UsageError(
                f"--name {self.name!r} is not the name of a folder", hint="letters, digits, '-', '_' and '.' will do"
            )


@dataclass(frozen=True, kw_only=True)
class TrainRetrievalConfig(TrainingConfig):
    """`vlkit train-retrieval`."""

    model: Annotated[str, "hub name, local folder, tiny-siglip or tiny-clip"] = "google/siglip-base-patch16-224"
    loss: Annotated[Literal["sigmoid", "softmax"] | None, "default: sigmoid for SigLIP, softmax for CLIP"] = None
    labels: Annotated[Literal["eye", "multi-positive", "mask"], "what counts as a match within a batch"] = (
        "multi-positive"
    )
    tune: Annotated[Literal["full", "last", "lora"], "what is trained; logit scale and bias always are"] = "full"
    unfreeze_layers: Annotated[int, "with --tune last: upper layers of each tower that are trained"] = 2
    lora_targets: Annotated[tuple[str, ...], "with --tune lora: attention projections of the encoder layers"] = (
        "q",
        "k",
        "v",
        "out",
    )
    lora_rank: Annotated[int, "with --tune lora"] = 8
    lora_alpha: Annotated[float, "with --tune lora: the update is scaled by alpha / rank"] = 16.0
    lora_dropout: Annotated[float, "with --tune lora"] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "unfreeze_layers", "lora_rank")
        _between(self, 0.0, 0.99, "lora_dropout")
        unknown = set(self.lora_targets) - {"q", "k", "v", "out"}
        if unknown or not self.lora_targets:
            raise UsageError(f"--lora-targets {','.join(self.lora_targets)}: choose from q, k, v, out")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """`vlkit eval`."""

    run: Annotated[Path | None, "run folder to measure"] = None
    model: Annotated[str | None, "instead of --run: a model as it is, with --data and --out"] = None
    data: Annotated[Path | None, "prepared folder (default: the run's)"] = None
    out: Annotated[Path | None, "folder for the results (default: the run's)"] = None
    split: Annotated[Literal["train", "val", "test"], "rows to measure on"] = "test"
    limit: Annotated[int | None, "measure on about this many rows, drawn by the seed"] = None
    batch_size: Annotated[int, "pictures or texts encoded at a time"] = 64
    precision: Annotated[Literal["bf16", "fp16", "fp32"] | None, "of the encoders (default: the run's)"] = None
    draws: Annotated[int, "bootstrap draws behind an interval"] = 2000
    seed: Annotated[int, "of the draws and of --limit"] = 42

    def __post_init__(self) -> None:
        _at_least(self, 1, "limit", "batch_size")
        _at_least(self, 1000, "draws")
        if (self.run is None) == (self.model is None):
            raise UsageError("eval measures a run or a model: give --run RUN, or --model M --data DIR --out DIR")
        if self.model is not None and (self.data is None or self.out is None):
            raise UsageError("eval --model needs --data DIR and --out DIR")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Settings):
    """`vlkit quickstart`."""

    out: Annotated[Path, "folder for the tour"] = Path("quickstart")
    steps: Annotated[int | None, "optimizer steps (default: the tiny model's)"] = None
    seed: Annotated[int, "decides split, initial weights and order"] = 42

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps")
        _at_least(self, 0, "seed")


def model_preset(model: str) -> dict[str, Any]:
    """Settings that go with a model: the tiny ones start from nothing and need other rates than pretrained ones."""
    if model in TINY_MODELS:
        return {"tune": "full", "steps": 1000, "batch_size": 64, "lr": 1.5e-3, "warmup": 0.3}
    return {"epochs": 3.0, "batch_size": 32}


def domain_preset(domain: str, command: str) -> dict[str, Any]:
    """The part of a domain's YAML that is about `command` ("prep" or "train-retrieval").

    Raises:
        UsageError: no such domain, or the YAML has a section that no command reads.
    """
    from vlkit.settings import read_yaml

    shipped = {path.stem: path for path in (Path(__file__).parent / "domains").glob("*.yaml")}
    path = Path(domain) if domain.endswith((".yaml", ".yml")) else shipped.get(domain)
    if path is None:
        from vlkit.errors import nearest

        raise UsageError(f"unknown domain {domain!r}", hint=nearest(domain, sorted(shipped)))
    sections = read_yaml(path)
    for section, config in (("prep", PrepConfig), ("train-retrieval", TrainRetrievalConfig)):
        config.check_keys(sections.get(section) or {}, f"{path}, section {section}")
    if unknown := set(sections) - {"prep", "train-retrieval"}:
        raise UsageError(f"{path}: unknown section {sorted(unknown)[0]!r}", hint="known: prep, train-retrieval")
    return dict(sections.get(command) or {})


def resolve_prep(given: Mapping[str, Any]) -> PrepConfig:
    """PrepConfig from what was given on the command line and in YAML, over the domain's preset."""
    if not given.get("domain"):
        raise UsageError("prep needs --domain NAME", hint="for example: vlkit prep --domain recipes --source raw/")
    domain = str(given["domain"])
    config = PrepConfig.from_layers(domain_preset(domain, "prep"), given)
    return config if config.out else dataclasses.replace(config, out=Path("data") / Path(domain).stem)


def resolve_train_retrieval(given: Mapping[str, Any]) -> TrainRetrievalConfig:
    """TrainRetrievalConfig over the presets of the data's domain and of the model.

    A domain's preset belongs to the model it names: with another --model its rates would be wrong, and it stays out.
    """
    given = dict(given)
    data = Path(given["data"]) if given.get("data") else only_prepared_folder()
    given["data"] = data
    preset = _preset_of_data(data)
    model = str(given.get("model") or preset.get("model") or TrainRetrievalConfig.model)
    if preset.get("model", model) != model:
        preset = {}
    return TrainRetrievalConfig.from_layers(model_preset(model), preset, given)


def _preset_of_data(data: Path) -> dict[str, Any]:
    from vlkit.settings import read_yaml

    described = data / "data.yaml"
    settings = read_yaml(described).get("settings", {}) if described.is_file() else {}
    domain = settings.get("domain")
    if not domain or (str(domain).endswith((".yaml", ".yml")) and not Path(domain).is_file()):
        return {}
    return domain_preset(str(domain), "train-retrieval")


def only_prepared_folder(root: Path = Path("data")) -> Path:
    """The one prepared folder under data/, for commands called without --data."""
    found = sorted(path.parent for path in root.glob("*/pairs.*"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"no --data, and no prepared folder under {root}/",
            hint="prepare one: vlkit prep --domain recipes --source raw/",
        )
    raise UsageError(
        f"no --data, and {len(found)} prepared folders under {root}/: {', '.join(map(str, found))}",
        hint=f"say which: --data {found[0]}",
    )


def _values(config: Settings, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]


def _at_least(config: Settings, low: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not value >= low:
            raise UsageError(f"{config.fields()[name].flag} {value} must be at least {low}")


def _above(config: Settings, low: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not value > low:
            raise UsageError(f"{config.fields()[name].flag} {value} must be above {low}")


def _between(config: Settings, low: float, high: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not low <= value <= high:
            raise UsageError(f"{config.fields()[name].flag} {value} must lie between {low} and {high}")
