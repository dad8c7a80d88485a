"""The dual encoder: a picture and a text become unit vectors, their product a logit.

`Towers` wraps transformers' SiglipModel or CLIPModel; what differs between the two families stands in `FAMILIES`, and
nothing else in vlkit asks which one it has. Loading goes by transformers' own format, hub or folder.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlkit.config.data import TINY_MODELS
from vlkit.data.images.spec import PixelSpec
from vlkit.errors import ArtifactError, NetworkError, UsageError, VlkitError, suggest_name
from vlkit.models import paired_encoder, preprocessing, quantization, stages
from vlkit.models.device import Precision
from vlkit.models.fast.layers import use_fast_layers
from vlkit.models.stages import PartialForward, Stage, run_stages
from vlkit.storage import json_text

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Family:
    """What one kind of dual encoder does differently.

    pad_to_limit: SigLIP was trained on texts of exactly 64 tokens and pools the last position, so it must be padded to
        them; CLIP is causal and pools at the end of the text, so padding to the batch's longest changes nothing.
    max_scale: CLIP clamps exp(logit_scale) at 100; SigLIP must not be clamped (one published scale is 112.3).
    """

    model_class: str
    pad_to_limit: bool
    loss: str
    max_scale: float | None


FAMILIES = {
    "siglip": Family("SiglipModel", pad_to_limit=True, loss="sigmoid", max_scale=None),
    "clip": Family("CLIPModel", pad_to_limit=False, loss="softmax", max_scale=100.0),
}


class DualEncoder(torch.nn.Module):
    """A vision and a text encoder with a common space.

    Attributes:
        model: transformers' model; adapters are put into it in place.
        source: hub name or folder it came from.
        peft: the PeftModel around `model` where it has adapters, else None.
    """

    def __init__(self, model: Any, tokenizer: Any, pixel_spec: PixelSpec, source: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pixel_spec, self.source = model, tokenizer, pixel_spec, source
        self.peft: Any = None
        self.family = FAMILIES[model.config.model_type]
        use_fast_layers(model)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixel_spec.mean, pixel_spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def image_chain(self) -> list[Stage]:
        """From normalised pixels to a picture's row of the common space, which is not a unit vector yet."""
        return stages.image_chain(self.model)

    @property
    def text_chain(self) -> list[Stage]:
        """From padded token ids to a text's row of the common space, which is not a unit vector yet."""
        return stages.text_chain(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def width(self) -> int:
        """Of the common space."""
        config = self.model.config
        return getattr(config, "projection_dim", None) or config.vision_config.hidden_size

    @property
    def is_paired(self) -> bool:
        """The text encoder is one of its own kind, beside another model's vision tower."""
        return isinstance(self.model, paired_encoder.PairedEncoder)

    def tower_config(self, kind: str) -> Any:
        """The configuration of the vision tower, for "pictures", or of the text tower."""
        return self.model.config.vision_config if kind == "pictures" else self.model.config.text_config

    @property
    def text_limit(self) -> int:
        """Tokens a text may have, special ones included."""
        config = self.model.config.text_config
        return paired_encoder.text_limit(config, self.tokenizer) if self.is_paired else config.max_position_embeddings

    @property
    def pads_to_max_length(self) -> bool:
        """Every text is padded to the limit, else to the longest of its batch."""
        return self.family.pad_to_limit and not self.is_paired

    @property
    def pad_id(self) -> int:
        """What texts are padded with."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text, unpadded, cut to the limit with the end-of-text token kept; and how many were cut."""
        if not texts:
            return [], 0
        whole = _token_ids(self.tokenizer, texts)
        limit = self.text_limit
        return [ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:] for ids in whole], sum(
            len(ids) > limit for ids in whole
        )

    def pad(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids as one int64 tensor [texts, length]: the limit for SigLIP, the longest of these texts for CLIP."""
        length = self.text_limit if self.pads_to_max_length else max(map(len, ids), default=0)
        padded = torch.full((len(ids), length), self.pad_id, dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        return padded

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [pictures, 3, size, size] -> what the image chain begins with, on the towers' device."""
        # In place: more copies of a batch's pictures would cost more than the arithmetic.
        return (pixels.to(self.device) / 255).sub_(self.mean).div_(self.std)

    def pool_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [texts]: where CLIP pools: the first token of the end, which pads, too, in some CLIPs. Elsewhere 0."""
        if self.is_paired or self.pads_to_max_length or not len(input_ids):
            return torch.zeros(len(input_ids), dtype=torch.long)
        end = self.model.config.text_config.eos_token_id
        # Configurations older than the token's number say 2: there the end is the highest of all tokens.
        found = input_ids if end == 2 else (input_ids == end).int()
        return found.argmax(dim=-1)

    def embed_images(self, pictures: torch.Tensor | PartialForward) -> torch.Tensor:
        """uint8 [pictures, 3, size, size], or what the lower stages made of it -> unit rows [pictures, width]."""
        begun = pictures if isinstance(pictures, PartialForward) else PartialForward(self.normalize_pixels(pictures), 0)
        return self._embedded(self.image_chain, begun)

    def embed_texts(self, texts: torch.Tensor | PartialForward) -> torch.Tensor:
        """Padded token ids [texts, length], or what the lower stages made of them -> unit rows [texts, width].

        No attention mask: SigLIP was trained without, a causal CLIP does not look behind the end of its text, and a
        pair makes its own.
        """
        begun = (
            texts
            if isinstance(texts, PartialForward)
            else PartialForward(texts.to(self.device), 0, self.pool_positions(texts))
        )
        return self._embedded(self.text_chain, begun)

    def _embedded(self, chain: Sequence[Stage], begun: PartialForward) -> torch.Tensor:
        if not len(begun):
            return torch.zeros(0, self.width, device=self.device)
        values = begun.values.to(self.device)
        values = values.float() if values.is_floating_point() else values
        return F.normalize(run_stages(chain, PartialForward(values, begun.depth, begun.pool_positions)).values.float(), dim=-1)

    def logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """scale * cosine + bias, float32 [images, texts]. Autocast is off: a bf16 logit at scale 100 errs by 0.1."""
        with torch.autocast(images.device.type, enabled=False):
            scaled = self.model.logit_scale.float().exp() * (images.float() @ texts.float().T)
            bias = getattr(self.model, "logit_bias", None)
            return scaled if bias is None else scaled + bias.float()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """After a step: keep CLIP's scale where CLIP was trained to have it."""
        if self.family.max_scale is not None:
            self.model.logit_scale.clamp_(max=math.log(self.family.max_scale))

    def logit_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Scale and, where there is one, bias. They are always trained, and no PEFT adapter file holds them."""
        return {name: p for name, p in self.model.named_parameters() if name in ("logit_scale", "logit_bias")}

    def save(self, folder: Path) -> None:
        """Everything that transformers needs to load this again: weights, tokenizer, preprocessing."""
        if not self.is_paired:
            self.model.save_pretrained(folder)
            self.save_processors(folder)
            return
        paired_encoder.save(self.model, folder)
        self.tokenizer.save_pretrained(Path(folder) / "text")
        self._save_preprocessing(Path(folder) / "vision")

    def save_processors(self, folder: Path) -> None:
        """Tokenizer and preprocessing alone."""
        self.tokenizer.save_pretrained(folder)
        self._save_preprocessing(Path(folder))

    def _save_preprocessing(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(
            json_text(preprocessing.processor_dict(self.pixel_spec), indent=2) + "\n", encoding="utf-8"
        )


def quiet_transformers() -> Any:
    """The transformers module, its warnings and bars off: what the user must know, vlkit says."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers


def load(name: str, *, quantized: Precision | None = None) -> DualEncoder:
    """A dual encoder by hub name or local folder, in float32, on the CPU, in eval mode.

    Args:
        quantized: in 4 bits instead, multiplied in this precision, on the device that it will be used on.

    Raises:
        UsageError: no such model, or one that is no dual encoder.
        NetworkError: the hub cannot be reached and the model is not in the cache.
        ArtifactError: the folder's files do not belong together.
    """
    transformers = quiet_transformers()
    if (Path(name) / paired_encoder.PAIR).is_file():
        if quantized is not None:
            raise UsageError(f"{name} is a pair, which --quantize does not take", hint="leave out --quantize")
        return _load_pair(name)
    config = load_config(name)
    with translate_hub_errors(name):
        model_class = getattr(transformers, FAMILIES[config.model_type].model_class)
        how = {} if quantized is None else quantization.loading_options(quantized)
        model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **how)
        quantization.keep_weights_unpacked(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        pixel_spec = preprocessing.read(name, config)
    known, wanted = len(tokenizer), config.text_config.vocab_size
    if not wanted / 2 <= known <= wanted:
        told = f"its tokenizer knows {known} tokens, its model {wanted}"
        raise ArtifactError(
            f"{name}: {told}", hint="the folder lacks its tokenizer's files: save the tokenizer there too"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ArtifactError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    return DualEncoder(model.eval(), tokenizer, pixel_spec, name)


def _load_pair(name: str) -> DualEncoder:
    with translate_hub_errors(name):
        model, tokenizer = paired_encoder.load(Path(name))
        vision = paired_encoder.PairParts.of(Path(name)).vision
        spec = preprocessing.read(vision, model.config)
    return DualEncoder(model, tokenizer, spec, name)


def load_tokenizer(name: str) -> tuple[Callable[[Sequence[str]], list[list[int]]], int]:
    """How a dual or text encoder cuts texts into tokens, special ones included, none cut off; and how many it takes."""
    transformers = quiet_transformers()
    config = read_config(name)
    with translate_hub_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    dual = config.model_type in FAMILIES
    limit = config.text_config.max_position_embeddings if dual else paired_encoder.text_limit(config, tokenizer)
    return lambda texts: _token_ids(tokenizer, texts), limit


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    options = {"add_special_tokens": True, "padding": False, "truncation": False, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"]


def load_config(name: str) -> Any:
    """Only the configuration, refused where it is of no family that vlkit knows."""
    transformers = quiet_transformers()
    if (Path(name) / paired_encoder.PAIR).is_file():
        halves = paired_encoder.PairParts.of(Path(name))
        return paired_encoder.pair_config(*map(read_config, (halves.vision, halves.text)), halves.pooling)
    refuse_unknown(name, TINY_MODELS, "openai/clip-vit-base-patch32")
    with translate_hub_errors(name):
        config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type not in FAMILIES:
        raise UsageError(f"{name} is a {config.model_type} model", hint=f"vlkit adapts {' and '.join(FAMILIES)} models")
    return config


def refuse_unknown(name: str, known: Sequence[str], example: str) -> None:
    """Refuse what can be no model: neither a folder of one, nor the form of a hub name.

    Args:
        known: names that mean something else here.
        example: of a hub name.
    """
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        hint = (
            suggest_name(name, known) if "/" not in name else f"a folder with config.json, or a hub name such as {example}"
        )
        raise UsageError(f"unknown model {name!r}: no such folder, and not the form of a hub name", hint=hint)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds no config.json", hint="give a folder that save_pretrained wrote, or a hub name")


def pair_part_config(name: str) -> Any:
    """The configuration of a model that one half of a pair is taken from: any that AutoModel opens."""
    if (Path(name) / paired_encoder.PAIR).is_file():
        raise UsageError(f"{name} is a pair already", hint=f"its halves: {name}/vision and {name}/text")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds no config.json", hint="give a folder that save_pretrained wrote, or a hub name")
    if name in (*TINY_MODELS, paired_encoder.TINY_TEXT):
        raise UsageError(
            f"--model takes one of {', '.join(TINY_MODELS)}, --text-model {paired_encoder.TINY_TEXT}; not {name}"
        )
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise UsageError(f"no such folder: {name}")
    return read_config(name)


def read_config(name: str) -> Any:
    """transformers' configuration at a hub name or folder, of whatever kind."""
    transformers = quiet_transformers()
    with translate_hub_errors(name):
        return transformers.AutoConfig.from_pretrained(name)


def encoder_on_meta(config: Any) -> DualEncoder:
    """The model of a configuration on the meta device: names, shapes and counts without a byte of weights."""
    transformers = quiet_transformers()
    with torch.device("meta"):
        if isinstance(config, paired_encoder.PairConfig):
            model: Any = _pair_on_meta(config)
        else:
            model = getattr(transformers, FAMILIES[config.model_type].model_class)(config)
    return DualEncoder(model, None, PixelSpec(config.vision_config.image_size), "meta")


def _pair_on_meta(config: paired_encoder.PairConfig) -> paired_encoder.PairedEncoder:
    transformers = quiet_transformers()
    text = transformers.AutoModel.from_config(config.text_config)
    if config.model_type == "siglip":
        return paired_encoder.PairedEncoder(config, transformers.SiglipVisionModel(config.vision_config), None, text)
    vision = transformers.CLIPVisionModel(config.vision_config)
    projection = torch.nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
    return paired_encoder.PairedEncoder(config, vision, projection, text)


@contextmanager
def translate_hub_errors(name: str) -> Iterator[None]:
    """Turns what transformers raises while loading a model into one message of ours."""
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
            offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
            hint = "fetch it once where there is a network; or give a local folder"
            raise NetworkError(f"{name} is not in the local cache, and {offline}", hint=hint) from error
        if isinstance(error, ImportError):
            raise
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{name} cannot be loaded: {told}", hint="save or fetch the model again") from error
