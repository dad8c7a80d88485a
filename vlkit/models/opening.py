"""A model by the name a user gives: a hub name, a local folder, or a tiny model that is made here."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkit.models import adapters, tiny, towers
from vlkit.models.towers import Towers
from vlkit.runs import Run


def config_of(name: str) -> Any:
    """transformers' configuration of a model, without its weights; refused where vlkit knows no such model.

    A tiny model's vocabulary is known only once its tokenizer has seen the texts: here it has the default size.
    """
    return tiny.config_of(name) if name in tiny.MAKERS else towers.load_config(name)


def open_model(name: str, texts: Sequence[str], *, seed: int, keep_in: Path | None = None) -> Towers:
    """The untouched model, with its weights.

    Args:
        texts: training texts, for the tokenizer of a tiny model.
        seed: of a tiny model's weights.
        keep_in: folder where a tiny model stays, and is found again; None: it stays nowhere.
    """
    if name not in tiny.MAKERS:
        return towers.load(name)
    if keep_in is None:
        with tempfile.TemporaryDirectory() as folder:
            return open_model(name, texts, seed=seed, keep_in=Path(folder) / name)
    if not keep_in.is_dir():
        tiny.write_tiny(name, texts, keep_in, seed=seed)
    return towers.load(str(keep_in))


def base_of(run: Run) -> str:
    """The untouched model of a run: where vlkit made it, or the name it was loaded by."""
    return str(run.base) if run.base.is_dir() else str(run.config()["model"])


def open_trained(name: str) -> Towers:
    """A model that knows something: a run's, by its folder, or one by its hub name or local folder.

    Raises:
        ArtifactError: the run was not trained to its end, or is none.
    """
    run = Run(Path(name))
    if not run.folder.exists() and run.folder.parent.name == "runs":
        run.config()  # Says that there is none, and which there are.
    return adapters.load_adapted(run.folder, base_of(run)) if run.begun else towers.load(name)
