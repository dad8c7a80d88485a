"""tiny-qwen learns a language: captions, and to say in its own words what stands in the user's turn.

A document is a chat: the user's turn holds one caption of a picture, the answer is another one. So the model learns
which words follow which, and that what it reads there decides what it says. It never sees a picture; then it is frozen.
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
from vlkit.training.loop import adamw, cosine_schedule, steps

BATCH, LR = 48, 2e-3
# Words of the user's turn.
HEARD = (8, 40)
# Pictures whose captions it learns from, at most: a sample teaches the language.
PICTURES = 20_000


def write_tiny_llm(pairs: Pairs, prompt: str, folder: Path, *, seed: int, total: int) -> None:
    """Make tiny-qwen and teach it the texts of a table; the folder appears when it is done.

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
        losses = _taught(language, _captions_of(pairs), prompt, seed, total)
        console.say(f"tiny-qwen has learned the language of {len(set(texts))} texts: {losses:.2f} nats a token")
        language.model.save_pretrained(aside)


def _captions_of(pairs: Pairs) -> list[list[str]]:
    """The captions of each picture."""
    found: dict[str, list[str]] = defaultdict(list)
    for image, text in zip(pairs.frame["image_id"], pairs.frame["text"], strict=True):
        if image in found or len(found) < PICTURES:
            found[image].append(text)
    return list(found.values())


def _taught(language: LanguageModel, captions: list[list[str]], prompt: str, seed: int, total: int) -> float:
    """Train it; returns the mean loss of the last tenth."""
    model, asked = language.model, language.prompt_ids(prompt)
    model.train()
    tokens = [[language.tokens(text) for text in each] for each in captions]

    def documents() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = np.random.default_rng(seed)
        while True:
            chats = []
            for picture in rng.integers(len(tokens), size=BATCH):
                said, answer = (tokens[picture][int(rng.integers(len(tokens[picture])))] for _ in range(2))
                # Its words in any order, some more than once, some not at all: as a picture's tokens may say them.
                said = rng.choice(said, size=int(rng.integers(*HEARD))).tolist()
                chats.append([*asked.prefix, *said, *asked.suffix, *answer, language.eos_id][: language.context_length])
            yield pad_captions(chats, language.pad_id)

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, lengths = (each.to(language.embeddings.device) for each in batch)
        there = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=there.long(), use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[there[:, 1:]].float(), ids[:, 1:][there[:, 1:]])

    named = dict(model.named_parameters())
    optimizer = adamw(named, lr=LR, weight_decay=0.01)
    seen: list[float] = []
    with console.progress("teaching tiny-qwen its language", total) as bar:
        for step in steps(
            documents(),
            loss_of,
            lambda batch: int(batch[1].sum() - len(batch[1])),
            optimizer,
            total=total,
            schedule=cosine_schedule(total, 0.05),
            seed=seed,
        ):
            seen.append(step.loss)
            bar.update(step.step, loss=step.loss)
    model.eval()
    return float(np.mean(seen[-max(1, total // 10) :]))
