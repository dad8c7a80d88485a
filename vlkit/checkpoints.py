"""Save, verify and restore checkpoints.

    checkpoints/step-000400/
      trainable.safetensors     the trained parameters by name; frozen ones come from the base model
      optimizer.safetensors     AdamW's moments and step counts, as "parameter/moment"
      state.json                the step, the loss scaler, seconds trained, the best so far and its scores, and whether
                                the evaluation of this very step is still to come
      MANIFEST.json             SHA-256 of each of the three

Why this is enough. Everything else that a step depends on is a function of its number and the settings: which rows make
its batch (a hash of seed, epoch and pair id), how images are varied (seed, epoch, image), what dropout drops (seed,
step, batch within the step), the learning rate (step). No random generator and no position in a data set has a state
that would have to be saved. On a CPU, in float32, the same bytes in give the same bytes out; so a run that was killed
and started again ends with the bytes of one that was never interrupted.

How it is written. Into a temporary folder: the tensors, then the state, then the manifest, last; each file and the
folder flushed to disk, then one rename, then the folder above flushed. A kill at any moment leaves no new checkpoint or
a complete one. last.json and best.json are written after it and only point: the truth is the newest checkpoint whose
manifest verifies, and a resume writes the pointers again.

How it is read. The manifest must name exactly the three files, so that a name like ../x is never opened; their hashes
must agree before anything is parsed. Tensors are safetensors and the rest is JSON: nothing that is read can execute. A
damaged checkpoint is named and the one before is taken; if none verifies the run ends with exit code 6, and never
starts at step 0 again.

What is never written: a number that is not finite. A resume drops later steps from metrics.jsonl: they are repeated and
logged again, so that each step is logged once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlkit import console
from vlkit.errors import ArtifactError, NonFiniteError, ResourceError
from vlkit.storage import atomic_folder, format_bytes, json_text

SCHEMA = 1
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's
# Approximate bytes of headers, state and manifest.
OVERHEAD_BYTES = 2**15
FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")
# How earlier versions named the rows of a token table that they trained, instead of its weight.
PARTIAL_TABLE = (".token_embedding.used", ".word_embeddings.used")
FOLDER_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    step: int
    state: dict[str, Any]

    def restore(
        self, trainable: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Copy the saved values into the parameters, and the moments into the optimizer.

        Raises:
            ArtifactError: names or shapes differ from the saved ones.
        """
        saved = _load_tensors(self.folder / "trainable.safetensors")
        shapes = {name: tuple(p.shape) for name, p in trainable.items()}
        saved_shapes = {name: tuple(t.shape) for name, t in saved.items()}
        if shapes != saved_shapes:
            if any(name.endswith(PARTIAL_TABLE) for name in saved_shapes):
                raise ArtifactError(
                    f"{self.folder} is from an earlier vlkit, which trained a part of the text encoder's token table",
                    hint="finish the run with that version, or train again under another --name",
                )
            name = sorted(shapes.items() ^ saved_shapes.items())[0][0]
            raise ArtifactError(f"{self.folder} belongs to another model or way of tuning: {name} differs")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])
        if optimizer is not None:
            _restore_optimizer(optimizer, _load_tensors(self.folder / "optimizer.safetensors"))


def folder_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def step_number(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def save(
    folder: Path,
    step: int,
    trainable: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Checkpoint:
    """Save one checkpoint below `folder`, complete or not at all.

    Raises:
        NonFiniteError: a weight or a moment is not a finite number; nothing is written.
        ResourceError: the disk is full or fails; earlier checkpoints are unchanged.
    """
    tensors = {
        "trainable.safetensors": {name: p.detach().cpu().contiguous() for name, p in trainable.items()},
        "optimizer.safetensors": _optimizer_tensors(optimizer),
    }
    for file_tensors in tensors.values():
        for name, value in file_tensors.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(f"after step {step}: {name} is not finite; this step is not saved")
    try:
        return _write(folder, step, tensors, state)
    except (OSError, SafetensorError) as error:
        if not _is_disk_error(error):
            raise
        values = (value for file_tensors in tensors.values() for value in file_tensors.values())
        required = sum(value.numel() * value.element_size() for value in values) + OVERHEAD_BYTES
        free = shutil.disk_usage(folder).free
        space = f"it needs {format_bytes(required)}, {format_bytes(free)} are free"
        hint = "the checkpoints before it are complete: make room, and run the same command again"
        raise ResourceError(f"{folder}: step {step} could not be saved ({error}): {space}", hint=hint) from None


def _is_disk_error(error: OSError | SafetensorError) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes)


def _write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Checkpoint:
    target = folder / folder_name(step)
    full_state = {"schema": SCHEMA, "step": step, **state}
    with atomic_folder(target) as aside:
        for name, file_tensors in tensors.items():
            save_file(dict(file_tensors), aside / name)
        (aside / "state.json").write_text(json_text(full_state, indent=2), encoding="utf-8")
        manifest = {"schema": SCHEMA, "files": {name: _hash(aside / name) for name in FILES}}
        (aside / "MANIFEST.json").write_text(json_text(manifest, indent=2), encoding="utf-8")
    return Checkpoint(target, step, dict(full_state))


def newest(folder: Path, *, before: int | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that verifies; warn about a damaged one and take the one before.

    Args:
        before: consider only earlier steps.

    Raises:
        ArtifactError: there are checkpoints, and all of them are damaged.
    """
    paths = [path for path in list_checkpoints(folder) if before is None or step_number(path) < before]
    for path in reversed(paths):
        try:
            return read_verified(path)
        except ArtifactError as error:
            console.warn(f"{error.message}; taking the one before")
    if paths:
        message = f"{folder}: all {len(paths)} checkpoints are damaged"
        raise ArtifactError(message, hint="start again under another --name")
    return None


def read_verified(path: Path) -> Checkpoint:
    """Check every file against the manifest, then read the state.

    Raises:
        ArtifactError: a file is missing or changed, or the schema is another version's.
    """
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        hashes = manifest["files"]
        is_valid = (
            manifest["schema"] == SCHEMA
            and set(hashes) == set(FILES)
            and all(_hash(path / name) == hashes[name] for name in FILES)
        )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if is_valid and state["schema"] == SCHEMA and state["step"] == step_number(path):
            return Checkpoint(path, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ArtifactError(f"the checkpoint {path} is damaged, or written by another version of vlkit")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints' folders, oldest first, unverified."""
    paths = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((path for path in paths if FOLDER_NAME.fullmatch(path.name)), key=step_number)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, damaged or not: those steps will be repeated, and saved again."""
    for path in list_checkpoints(folder):
        if step_number(path) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    for path in list_checkpoints(folder)[:-keep]:
        if best is None or path.name != folder_name(best):
            shutil.rmtree(path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as "parameter/moment" -> tensor."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{moment}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    moments: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        moments[name][moment] = value
    known = {name for group in optimizer.param_groups for name in group["param_names"]}
    # Empty before the first step that changed a weight; after it, complete for every parameter.
    if moments and (set(moments) != known or any(set(values) != MOMENTS for values in moments.values())):
        raise ArtifactError("optimizer.safetensors of this checkpoint belongs to another model or optimizer")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in moments[name].items()}
