"""Pretrain tiny-qwen: it learns the language of captions, and to repeat in its own words what the user's turn holds.

A document is a chat: the user's turn holds one caption of an image, the answer is another caption of it. The model
learns which words follow which, and that the user's turn decides the answer. It never sees an image; then it is frozen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vlkit import console
from vlkit.data.loading.caption_batches import pad_captions
from vlkit.data.pairs import Pairs
from vlkit.models.captioner.language_model import LanguageModel, load_llm
from vlkit.models.captioner.tiny_llm import write_fresh_llm
from vlkit.storage import atomic_folder
from vlkit.training.loop import steps
from vlkit.training.optimizer import adamw, cosine_schedule

BATCH, LR = 48, 2e-3
# Words of the user's turn.
USER_WORDS = (8, 40)
# Images whose captions are used, at most: a sample teaches the language.
MAX_IMAGES = 20_000


def write_tiny_llm(pairs: Pairs, prompt: str, folder: Path, *, seed: int, total: int) -> None:
    """Make tiny-qwen and pretrain it on the texts of a table; the folder appears when it is complete.

    Args:
        pairs: training rows.
        prompt: the words that will ask for a caption.
        total: steps.
    """
    texts = list(pairs.frame["text"])
    with atomic_folder(folder) as aside, torch.random.fork_rng(devices=[]):
        write_fresh_llm([*texts, prompt], aside, seed=seed)
        language = load_llm(str(aside), quantize="none", precision="fp32")
        language.model.requires_grad_(True)
        loss = _pretrain(language, _captions_by_image(pairs), prompt, seed, total)
        console.say(f"tiny-qwen is pretrained on {len(set(texts))} texts: {loss:.2f} nats a token")
        language.model.save_pretrained(aside)


def _captions_by_image(pairs: Pairs) -> list[list[str]]:
    """Return the captions of each image."""
    captions: dict[str, list[str]] = defaultdict(list)
    for image, text in zip(pairs.frame["image_id"], pairs.frame["text"], strict=True):
        if image in captions or len(captions) < MAX_IMAGES:
            captions[image].append(text)
    return list(captions.values())


def _pretrain(language: LanguageModel, captions: list[list[str]], prompt: str, seed: int, total: int) -> float:
    """Train the model in place. Return the mean loss of the last tenth of the steps, in nats a token."""
    model, template = language.model, language.prompt_ids(prompt)
    model.train()
    tokens = [[language.tokens(text) for text in texts] for texts in captions]

    def documents() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng(seed)
        while True:
            chats = []
            for image in rng.integers(len(tokens), size=BATCH):
                heard, answer = (tokens[image][int(rng.integers(len(tokens[image])))] for _ in range(2))
                # Words in any order, some repeated, some missing: as an image's tokens may tell them.
                words = rng.choice(heard, size=int(rng.integers(*USER_WORDS))).tolist()
                chat = [*template.prefix, *words, *template.suffix, *answer, language.eos_id]
                chats.append(chat[: language.context_length])
            yield pad_captions(chats, language.pad_id)

    def loss_fn(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, lengths = (tensor.to(language.embeddings.device) for tensor in batch)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[mask[:, 1:]].float(), ids[:, 1:][mask[:, 1:]])

    optimizer = adamw(dict(model.named_parameters()), lr=LR, weight_decay=0.01)
    losses: list[float] = []
    with console.progress("pretraining tiny-qwen", total) as bar:
        for step in steps(
            documents(),
            loss_fn,
            lambda batch: int(batch[1].sum() - len(batch[1])),
            optimizer,
            total=total,
            schedule=cosine_schedule(total, 0.05),
            seed=seed,
        ):
            losses.append(step.loss)
            bar.update(step.step, loss=step.loss)
    model.eval()
    return float(np.mean(losses[-max(1, total // 10) :]))
