"""A model by the name a user gives: a hub name, a local folder, or a tiny model that is made here."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkit.config.data import Decode
from vlkit.errors import ArtifactError
from vlkit.models import dual_encoder, paired_encoder, tiny, tuning
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.preprocessing import with_decode
from vlkit.runs import Run
from vlkit.storage import atomic_folder


def model_config(name: str, text_model: str | None = None) -> Any:
    """transformers' configuration of a model, without its weights; refused where vlkit knows no such model.

    A tiny model's vocabulary is known only once its tokenizer has seen the texts: here it has the default size.

    Args:
        text_model: beside the model's vision tower, instead of its own text tower.
    """
    if name in tiny.MAKERS:
        config = tiny.tiny_config(name)
    else:
        config = dual_encoder.load_config(name) if text_model is None else dual_encoder.pair_part_config(name)
    if text_model is None:
        return config
    text = tiny.text_config() if text_model == tiny.TEXT_MODEL else dual_encoder.pair_part_config(text_model)
    return paired_encoder.pair_config(config, text)


def load_or_create(
    name: str,
    texts: Sequence[str],
    *,
    seed: int,
    text_model: str | None = None,
    keep_in: Path | None = None,
    quantized: Precision | None = None,
    merged_from: Run | None = None,
) -> DualEncoder:
    """The untouched model, with its weights.

    Args:
        texts: training texts, for the tokenizer of a tiny model.
        seed: of a tiny model's weights, and of a pair's projection.
        text_model: beside the model's vision tower, instead of its own text tower.
        keep_in: folder where stays, and is found again, what no hub has: a tiny model, a pair's projection; None: it
            stays nowhere.
        quantized: in 4 bits, multiplied in this precision; None: in float32.
        merged_from: a run whose tuned model, an adapter being merged, is the untouched one; `keep_in` gets a copy.
    """
    if merged_from is not None and keep_in is not None:
        if not keep_in.is_dir():
            tuned = load_tuned(merged_from)
            if tuned.peft is not None:
                tuned.model, tuned.peft = tuned.peft.merge_and_unload(), None
            with atomic_folder(keep_in) as aside:
                tuned.save(aside)
        return dual_encoder.load(str(keep_in), quantized=quantized)
    if name not in tiny.MAKERS and text_model is None:
        return dual_encoder.load(name, quantized=quantized)
    if keep_in is None:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / Path(name).name
            return load_or_create(name, texts, seed=seed, text_model=text_model, keep_in=kept, quantized=quantized)
    if not keep_in.is_dir():
        if text_model is None:
            tiny.write_tiny(name, texts, keep_in, seed=seed)
        else:
            _write_pair(name, text_model, texts, keep_in, seed)
    return dual_encoder.load(str(keep_in), quantized=quantized)


def _write_pair(name: str, text_model: str, texts: Sequence[str], folder: Path, seed: int) -> None:
    """The folder of a pair of two models; those that exist elsewhere are only named."""
    config = model_config(name, text_model)
    config.pooling = paired_encoder.text_pooling(text_model)
    with atomic_folder(folder) as aside:
        if name in tiny.MAKERS:
            tiny.write_tiny(name, texts, aside / "vision", seed=seed)
        if text_model == tiny.TEXT_MODEL:
            tiny.write_tiny(text_model, texts, aside / "text", seed=seed)
        vision = "vision" if name in tiny.MAKERS else name
        text = "text" if text_model == tiny.TEXT_MODEL else text_model
        paired_encoder.write_fresh(aside, vision, text, config, seed=seed)


def load_base(run: Run, decode: Decode | None = None) -> DualEncoder:
    """The model that a run began with, in full precision: where vlkit made it, or by its name.

    Args:
        decode: another way to read pictures than the run's.
    """
    return with_decode(dual_encoder.load(_base_of(run)), decode or run.config()["decode"])


def load_tuned(run: Run, decode: Decode | None = None) -> DualEncoder:
    """What became of it.

    Args:
        decode: another way to read pictures than it was trained with.

    Raises:
        ArtifactError: it is not trained to its end, or its files are damaged.
    """
    settings = run.config()
    if not run.finished:
        raise ArtifactError(f"the run {run.folder} is not finished", hint="train it to its end: the same command again")
    quantized = settings["precision"] if settings.get("quantize") else None
    tuned = tuning.load_adapted(run.folder, _base_of(run), quantized=quantized)
    return with_decode(tuned, decode or settings["decode"])


def tuned_config(run: Run) -> Any:
    """transformers' configuration of what became of a run's model."""
    return model_config(str(run.folder / "model") if (run.folder / "model").is_dir() else _base_of(run))


def _base_of(run: Run) -> str:
    return str(run.base) if run.base.is_dir() else str(run.config()["model"])


def load_model(name: str, decode: Decode | None = None) -> DualEncoder:
    """A model that knows something: a run's, by its folder, or one by its hub name or local folder.

    Args:
        decode: how pictures are read; None: as the run read them, or fast.

    Raises:
        ArtifactError: the run was not trained to its end, or is none.
    """
    run = Run(Path(name))
    if not run.folder.exists() and run.folder.parent.name == "runs":
        run.config()  # Says that there is none, and which there are.
    return load_tuned(run, decode) if run.started else with_decode(dual_encoder.load(name), decode)
