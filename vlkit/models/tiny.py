"""Write tiny models: transformers' own classes with small configs, a tokenizer trained on the given texts.

They start from seeded random weights and are written as `save_pretrained` folders, so a downloaded model goes through
the same code.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlkit.data.images.spec import PixelSpec
from vlkit.errors import UsageError, suggest_name
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.hub import quiet_transformers
from vlkit.models.paired_encoder import TINY_TEXT
from vlkit.storage import atomic_folder

IMAGE_SIZE = 64
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 1000


def write_tiny(name: str, texts: Sequence[str], folder: Path, *, seed: int) -> None:
    """Write the tiny model `name` to `folder` as save_pretrained would.

    Args:
        texts: what the tokenizer is trained on: training texts only.
        seed: decides the weights; the same texts and seed give the same bytes.
    """
    makers = {**MAKERS, TEXT_MODEL: _write_xlmr}
    if name not in makers:
        raise UsageError(f"unknown tiny model {name!r}", hint=suggest_name(name, makers))
    quiet_transformers()
    with torch.random.fork_rng(devices=[]), atomic_folder(folder) as aside:
        torch.manual_seed(seed)
        makers[name](sorted(set(texts)), aside)


def tiny_config(name: str) -> Any:
    """Return a tiny dual encoder's configuration, with a vocabulary of the default size."""
    transformers = quiet_transformers()
    configs = {
        "tiny-siglip": lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=VISION),
        "tiny-clip": lambda: transformers.CLIPConfig(
            text_config=TEXT, vision_config=VISION, projection_dim=VISION["hidden_size"]
        ),
    }
    return configs[name]()


def _write_siglip(texts: Sequence[str], folder: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    tokenizer = _sentencepiece_tokenizer(texts, folder)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "projection_size": VISION["hidden_size"],
    }
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = SiglipModel(SiglipConfig(text_config={**text, **special}, vision_config=VISION))
    with torch.no_grad():
        # A fresh SiglipModel has 0 for both; these are the values that SigLIP starts from.
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    DualEncoder(model, tokenizer, PixelSpec(IMAGE_SIZE), str(folder)).save(folder)


def _write_clip(texts: Sequence[str], folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = _byte_pair_tokenizer(texts)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **special}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=VISION["hidden_size"]))
    spec = PixelSpec(IMAGE_SIZE, fit="crop", resize=IMAGE_SIZE)
    DualEncoder(model, tokenizer, spec, str(folder)).save(folder)


def _sentencepiece_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """Train a tokenizer of SigLIP's own class, over a SentencePiece model (pad 0, end 1, unknown 2)."""
    import sentencepiece
    from transformers import SiglipTokenizer

    # SiglipTokenizer lower-cases and drops punctuation before it looks anything up.
    plain = [re.sub(r"[^\w\s]", "", text.lower()) for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain),
        model_writer=model,
        vocab_size=VOCABULARY + len(set("".join(plain))),
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return SiglipTokenizer(vocab_file=str(folder / "spiece.model"), model_max_length=64)


def _byte_pair_tokenizer(texts: Sequence[str]) -> Any:
    """Train a tokenizer of CLIP's own class, over byte pairs; the vocabulary is ordered as CLIP's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    empty = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    # Every byte, and every byte at the end of a word: no text is ever unknown.
    tokens = [
        *alphabet,
        *(byte + "</w>" for byte in alphabet),
        *dict.fromkeys("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges=merges, model_max_length=77
    )


def text_config() -> Any:
    """Return the tiny text encoder's configuration, with a vocabulary of the default size."""
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(**TEXT, max_position_embeddings=130, type_vocab_size=1, vocab_size=VOCABULARY)


def _write_xlmr(texts: Sequence[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import XLMRobertaModel, XLMRobertaTokenizer

    learner = Tokenizer(models.Unigram())
    learner.normalizer, learner.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(learner.to_str())["model"]["vocab"]]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=128)
    config = text_config()
    config.vocab_size = len(tokenizer)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Dual encoders; and a text encoder for a pair.
MAKERS = {"tiny-siglip": _write_siglip, "tiny-clip": _write_clip}
TEXT_MODEL = TINY_TEXT
