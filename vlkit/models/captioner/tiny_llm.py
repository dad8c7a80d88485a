"""tiny-qwen: a Qwen2 of half a million parameters, whose words are those of the given texts.

Written here with random weights and a chat template; `training/pretrain_tiny_llm.py` teaches it the captions as a
language before it is frozen. The folder is what save_pretrained writes, so a downloaded model goes through the same
code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlkit.models.hub import quiet_transformers

VOCABULARY = 1000
CONTEXT_LENGTH = 512
END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    # Many small heads: with four, copying a word from the user's turn is not learned in a minute.
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": True,
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llm_config(vocabulary: int = VOCABULARY) -> Any:
    """Return the configuration, with a vocabulary of the default size."""
    return quiet_transformers().Qwen2Config(vocab_size=vocabulary, **SHAPE)


def write_fresh_llm(texts: Sequence[str], folder: Path, *, seed: int) -> None:
    """Write an untrained tiny-qwen; the same texts and seed give the same bytes.

    Args:
        texts: what its tokenizer is trained on.
    """
    transformers = quiet_transformers()
    tokenizer = _tokenizer(sorted(set(texts)))
    config = tiny_llm_config(len(tokenizer))
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Sequence[str]) -> Any:
    """Train a tokenizer of Qwen2's own class, over byte pairs learned here."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    # Captions stand behind a space as well as at the beginning of a line.
    forms = [form for text in texts for form in (text, f" {text}", f"\n{text}", "user\n", "assistant\n")]
    learner.train_from_iterator(forms, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *("".join(merge) for merge in merges), PAD, START, END])
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        eos_token=END,
        pad_token=PAD,
        unk_token=None,
        model_max_length=CONTEXT_LENGTH,
        additional_special_tokens=[START],
    )
    tokenizer.chat_template = CHAT
    return tokenizer
