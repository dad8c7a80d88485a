"""transformers and the hub: quiet, offline where asked for, their errors as messages of ours. Imports no torch."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlkit.config.data import TINY_MODELS
from vlkit.errors import ArtifactError, NetworkError, UsageError, VlkitError, suggest_name

_FOLDER_HINT = "give a folder that save_pretrained wrote, or a hub name"


def quiet_transformers() -> Any:
    """Return the transformers module, its warnings, progress bars and telemetry off."""
    _quiet_hub()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers


def _quiet_hub() -> None:
    """Set what huggingface_hub and tokenizers read from the environment, unless the user has."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def read_config(name: str) -> Any:
    """Read transformers' configuration of a model of any kind, by hub name or folder."""
    transformers = quiet_transformers()
    with translate_hub_errors(name):
        return transformers.AutoConfig.from_pretrained(name)


def has_local_tokenizer(name: str) -> bool:
    """Return whether a model's tokenizer is in a folder or in the hub's cache; asks no network.

    A tiny model's tokenizer is made from the training texts and is not known before.
    """
    if name in TINY_MODELS:
        return False
    if Path(name).exists():
        return True
    _quiet_hub()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return False
    return all(isinstance(path, str) for path in paths)


def refuse_unknown(name: str, known: Sequence[str], example: str) -> None:
    """Refuse what cannot be a model: neither a model's folder nor the form of a hub name.

    Args:
        known: names of tiny models, which a training run makes, for the hint.
        example: of a hub name.
    """
    if name in known and not Path(name).exists():
        message = f"{name}: a tiny model exists only in the run that made it"
        raise UsageError(message, hint="give the folder of that run: runs/NAME")
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        hint = f"a folder with config.json, or a hub name such as {example}"
        if "/" not in name:
            hint = suggest_name(name, known)
        raise UsageError(f"unknown model {name!r}: no such folder, and not the form of a hub name", hint=hint)
    refuse_without_config(name)


def refuse_without_config(name: str) -> None:
    """Refuse a folder that holds no model."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds no config.json", hint=_FOLDER_HINT)


@contextmanager
def translate_hub_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises while it loads a model into one message of ours."""
    from huggingface_hub import errors as hub

    try:
        yield
    except VlkitError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
            chain.append(cause)

        def caused_by(*kinds: type[BaseException]) -> bool:
            return any(isinstance(link, kinds) for link in chain)

        if caused_by(hub.GatedRepoError):
            raise UsageError(f"{name} is gated", hint="accept its licence on the hub and set HF_TOKEN") from error
        if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
            raise UsageError(f"the hub has no model {name!r}", hint="check the spelling: owner/name") from error
        if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
            reason, remedy = "the hub cannot be reached", "check the network"
            if os.environ.get("HF_HUB_OFFLINE"):
                reason, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
            message = f"{name} is not in the local cache, and {reason}"
            raise NetworkError(message, hint=f"{remedy}, or give a local folder") from error
        if isinstance(error, ImportError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{name} cannot be loaded: {reason}", hint="save or fetch the model again") from error
