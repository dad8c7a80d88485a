"""Load a dual encoder by the name a user gives: a hub name, a folder, a run, or a tiny model that is made here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlkit.config.data import TINY_MODELS, Decode
from vlkit.data.images.spec import PixelSpec
from vlkit.errors import ArtifactError, UsageError
from vlkit.models import families, paired_encoder, quantization, tiny
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder, token_ids
from vlkit.models.hub import (
    quiet_transformers,
    read_config,
    refuse_unknown,
    refuse_without_config,
    translate_hub_errors,
)
from vlkit.models.paired_encoder import PairConfig, PairParts, is_pair
from vlkit.models.preprocessing import with_decode
from vlkit.models.tuning import LOGIT_FILE, always_trained
from vlkit.runs import Run
from vlkit.storage import atomic_folder


def load_model(name: str, decode: Decode | None = None) -> DualEncoder:
    """Load the trained model of a run, by its folder, or a model by its hub name or local folder.

    Args:
        decode: how images are decoded; None: as the run decoded them, or fast.

    Raises:
        ArtifactError: the run was not trained to its end, or the folder is no run.
    """
    run = Run(Path(name))
    if not run.folder.exists() and run.folder.parent.name == "runs":
        run.config()  # Raises, and lists the runs that exist.
    return load_tuned(run, decode) if run.started else with_decode(load_dual_encoder(name), decode)


def load_base(run: Run, decode: Decode | None = None) -> DualEncoder:
    """Load the model that a run began with, in full precision: where vlkit made it, or by its name.

    Args:
        decode: another way to decode images than the run's.
    """
    return with_decode(load_dual_encoder(_base_name(run)), decode or run.config()["decode"])


def load_tuned(run: Run, decode: Decode | None = None) -> DualEncoder:
    """Load the model that a run trained.

    Args:
        decode: another way to decode images than it was trained with.

    Raises:
        ArtifactError: it is not trained to its end, or its files are damaged.
    """
    settings = run.config()
    if not run.finished:
        raise ArtifactError(f"the run {run.folder} is not finished", hint=f"train it to its end: {run.resume_command}")
    quantized = settings["precision"] if settings.get("quantize") else None
    tuned = load_exported(run.folder, _base_name(run), quantized=quantized)
    return with_decode(tuned, decode or settings["decode"])


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
    """Load a base model; first create what no hub has: a tiny model, a pair's projection.

    Args:
        texts: training texts, for the tokenizer of a tiny model.
        seed: of a tiny model's weights, and of a pair's projection.
        text_model: beside the model's vision tower, instead of its own text tower.
        keep_in: folder for what is created, where later calls find it; None: a temporary one.
        quantized: in 4 bits, multiplied in this precision; None: in float32.
        merged_from: a run whose trained model, an adapter being merged, is the base; `keep_in` gets a copy.
    """
    if merged_from is not None and keep_in is not None:
        if not keep_in.is_dir():
            tuned = load_tuned(merged_from)
            if tuned.peft is not None:
                tuned.model, tuned.peft = tuned.peft.merge_and_unload(), None
            with atomic_folder(keep_in) as folder:
                tuned.save(folder)
        return load_dual_encoder(str(keep_in), quantized=quantized)
    if name not in tiny.MAKERS and text_model is None:
        return load_dual_encoder(name, quantized=quantized)
    if keep_in is None:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / Path(name).name
            return load_or_create(name, texts, seed=seed, text_model=text_model, keep_in=path, quantized=quantized)
    if not keep_in.is_dir():
        if text_model is None:
            tiny.write_tiny(name, texts, keep_in, seed=seed)
        else:
            _write_pair(name, text_model, texts, keep_in, seed)
    return load_dual_encoder(str(keep_in), quantized=quantized)


def _write_pair(name: str, text_model: str, texts: Sequence[str], folder: Path, seed: int) -> None:
    """Write the folder of a pair of two models; it only names those that exist elsewhere."""
    config = model_config(name, text_model)
    config.pooling = paired_encoder.text_pooling(text_model)
    vision, text = name, text_model
    with atomic_folder(folder) as aside:
        if name in tiny.MAKERS:
            vision = "vision"
            tiny.write_tiny(name, texts, aside / vision, seed=seed)
        if text_model == tiny.TEXT_MODEL:
            text = "text"
            tiny.write_tiny(text_model, texts, aside / text, seed=seed)
        paired_encoder.write_fresh(aside, vision, text, config, seed=seed)


def load_dual_encoder(name: str, *, quantized: Precision | None = None) -> DualEncoder:
    """Load a dual encoder by hub name or local folder, in float32, on the CPU, in eval mode.

    Args:
        quantized: in 4 bits instead, multiplied in this precision, on the device that it will be used on.

    Raises:
        UsageError: no such model, or one that is no dual encoder.
        NetworkError: the hub cannot be reached and the model is not in the cache.
        ArtifactError: the folder's files do not belong together.
    """
    if is_pair(name):
        if quantized is not None:
            raise UsageError(f"{name} is a pair, which --quantize does not take", hint="leave out --quantize")
        return _load_pair(name)
    transformers, config = quiet_transformers(), dual_encoder_config(name)
    family = families.dual_family(config.model_type)
    with translate_hub_errors(name):
        model_class = getattr(transformers, family.model_class)
        options = {} if quantized is None else quantization.loading_options(quantized)
        model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
        quantization.keep_weights_unpacked(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        pixel_spec = family.preprocessing.read(name, config.vision_config)
    known, expected = len(tokenizer), config.text_config.vocab_size
    if not expected / 2 <= known <= expected:
        raise ArtifactError(
            f"{name}: its tokenizer knows {known} tokens, its model {expected}",
            hint="the folder lacks its tokenizer's files: save the tokenizer there too",
        )
    refuse_missing_weights(name, report["missing_keys"])
    return DualEncoder(model.eval(), tokenizer, pixel_spec, name)


def refuse_missing_weights(name: str, missing: Sequence[str]) -> None:
    """Refuse a model whose files lack some of its weights.

    Raises:
        ArtifactError: names one of them.
    """
    if missing:
        raise ArtifactError(f"{name}: {len(missing)} weights are missing, for example {min(missing)}")


def _load_pair(name: str) -> DualEncoder:
    with translate_hub_errors(name):
        model, tokenizer = paired_encoder.load(Path(name))
        family = families.dual_family(model.config.model_type)
        pixel_spec = family.preprocessing.read(PairParts.read(Path(name)).vision, model.config.vision_config)
    return DualEncoder(model, tokenizer, pixel_spec, name)


def load_exported(folder: Path, base: str, *, quantized: Precision | None = None) -> DualEncoder:
    """Load the trained model that `tuning.export` wrote below `folder`.

    Args:
        base: the model that an adapter belongs on.
        quantized: the base in 4 bits, as it was when the adapter was trained.

    Raises:
        ArtifactError: neither model/ nor adapter/ is there, or the adapter does not fit the base.
    """
    if (folder / "model").is_dir():
        return load_dual_encoder(str(folder / "model"))
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise ArtifactError(
            f"{folder} holds no trained model",
            hint="train it to its end: run the same vlkit train-retrieval command again",
        )
    encoder = load_dual_encoder(base, quantized=quantized)
    from peft import PeftModel

    try:
        encoder.peft = PeftModel.from_pretrained(encoder.model, adapter)
        saved = load_file(adapter / LOGIT_FILE)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{adapter} does not fit {base}: {str(error).splitlines()[0]}") from None
    parameters = always_trained(encoder)
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in saved.items()}:
        raise ArtifactError(f"{adapter} does not fit {base}: its logit parameters are another family's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return encoder


def load_tokenizer(name: str) -> tuple[Callable[[Sequence[str]], list[list[int]]], int]:
    """Load how a dual or text encoder cuts texts into tokens, from this machine alone.

    Returns:
        texts -> token ids of each, special ones included, none cut off; and how many the model takes.
    """
    config = read_config(name)
    with translate_hub_errors(name):
        tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(name, local_files_only=True)
    if families.is_dual(config.model_type):
        limit = families.dual_family(config.model_type).text_limit(config, tokenizer)
    else:
        limit = families.text_encoder_limit(config, tokenizer)
    return lambda texts: token_ids(tokenizer, texts), limit


def model_config(name: str, text_model: str | None = None) -> Any:
    """Read transformers' configuration of a base model, without its weights; refuse what vlkit does not know.

    A tiny model's vocabulary is known only once its tokenizer has seen the texts: here it has the default size.

    Args:
        text_model: beside the model's vision tower, instead of its own text tower.
    """
    if name in tiny.MAKERS:
        config = tiny.tiny_config(name)
    else:
        config = dual_encoder_config(name) if text_model is None else _pair_part_config(name)
    if text_model is None:
        return config
    text = tiny.text_config() if text_model == tiny.TEXT_MODEL else _pair_part_config(text_model)
    return paired_encoder.pair_config(config, text)


def tuned_config(run: Run) -> Any:
    """Read transformers' configuration of the model that a run trained."""
    return model_config(str(run.folder / "model") if (run.folder / "model").is_dir() else _base_name(run))


def _base_name(run: Run) -> str:
    return str(run.base) if run.base.is_dir() else str(run.config()["model"])


def dual_encoder_config(name: str) -> Any:
    """Read a dual encoder's configuration, by hub name or local folder; refuse families that vlkit does not know."""
    if is_pair(name):
        parts = PairParts.read(Path(name))
        return paired_encoder.pair_config(read_config(parts.vision), read_config(parts.text), parts.pooling)
    refuse_unknown(name, TINY_MODELS, "openai/clip-vit-base-patch32")
    config = read_config(name)
    if not families.is_dual(config.model_type):
        families.refuse_family(config.model_type, name)
    return config


def _pair_part_config(name: str) -> Any:
    """Read the configuration of a model that one part of a pair is taken from: any that AutoModel opens."""
    if is_pair(name):
        raise UsageError(f"{name} is a pair already", hint=f"its parts: {name}/vision and {name}/text")
    refuse_without_config(name)
    if name in (*TINY_MODELS, tiny.TEXT_MODEL):
        raise UsageError(f"--model takes one of {', '.join(TINY_MODELS)}, --text-model {tiny.TEXT_MODEL}; not {name}")
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise UsageError(f"no such folder: {name}")
    return read_config(name)


def encoder_on_meta(config: Any) -> DualEncoder:
    """Return the model of a configuration on the meta device: names, shapes and counts without a byte of weights."""
    with torch.device("meta"):
        if isinstance(config, PairConfig):
            model: Any = paired_encoder.pair_on_meta(config)
        else:
            model = getattr(quiet_transformers(), families.dual_family(config.model_type).model_class)(config)
    return DualEncoder(model, None, PixelSpec(config.vision_config.image_size), "meta")
