"""The trainers that vlkit is measured beside, each by its own loop, on the same folder of a model and the same files.

    open_clip               its own train_one_epoch and preprocessing, rows read as its CsvDataset does; 77 tokens
    transformers            Trainer over CLIPModel with its own image processor; 77 tokens
    sentence-transformers   its trainer with the symmetric in-batch loss; texts padded to the longest of the batch

A peer is `trained(steps)`: seconds of each step but the first, data loading included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip_weights import from_open_clip, open_clip_model
from torch.utils.data import DataLoader, SequentialSampler

Trained = Callable[[int], list[float]]


@dataclass(frozen=True)
class Work:
    """What all do.

    Attributes:
        model: folder of a CLIP, as save_pretrained writes it.
        files, texts: JPEG files and a caption of each.
        order: rows of every batch, in their order, more than will be asked for.
        lr: of AdamW; the scale of each way's own loop for everything else.
        workers: that load data beside the training process, one batch ahead.
    """

    model: Path
    files: Sequence[Path]
    texts: Sequence[str]
    order: Sequence[Sequence[int]]
    precision: str
    lr: float = 1e-5
    weight_decay: float = 0.01
    workers: int = 1
    limit: int = 77
    seed: int = 0


def declare_torchvision() -> None:
    """A torchvision built for CUDA lacks two operators beside a CPU torch, which its import wants to know of."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# Before anybody imports transformers, which imports torchvision where there is one.
declare_torchvision()


def missing(*packages: str) -> list[str]:
    """Those of them that are not installed."""
    from importlib.util import find_spec

    return [package for package in packages if find_spec(package) is None]


def weights_of(way: str, model: Any, config: Any) -> dict[str, torch.Tensor]:
    """What a peer has trained, under transformers' names."""
    if way == "open_clip":
        return from_open_clip(model.state_dict(), config)
    return dict((model[0].auto_model if way == "sentence-transformers" else model).state_dict())


class Timed:
    """A loader that notes when each batch is asked for, as open_clip's loop wants it."""

    def __init__(self, loader: Any, batches: int, samples: int) -> None:
        self.loader, self.num_batches, self.num_samples = loader, batches, samples
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            self.asked.append(time.perf_counter())
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


def open_clip_trainer(work: Work, *, lock_image: bool = False) -> tuple[Any, Trained]:
    """open_clip's model and its own training loop.

    Args:
        lock_image: its image tower stays as it is, as its --lock-image does it.
    """
    model = open_clip_model(work.model)
    if lock_image:
        model.lock_image_tower()
    from open_clip import ClipLoss, image_transform
    from open_clip_train.train import train_one_epoch
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work.model)
    transform = image_transform(
        model.visual.image_size[0],
        is_train=False,  # Resize, cut the centre: as all do.
    )
    dataset = _OpenClipRows(work, transform, tokenizer)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "logit_scale" in name]
    decayed = [p for _, p in named if not any(p is other for other in plain)]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": work.weight_decay}],
        lr=work.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    arguments = open_clip_arguments(work.precision, len(work.order[0]))
    done = 0

    def trained(steps: int) -> list[float]:
        nonlocal done
        some = [list(rows) for rows in work.order[done : done + steps]]
        done += steps
        loader = DataLoader(
            dataset, batch_sampler=some, num_workers=work.workers, prefetch_factor=1 if work.workers else None
        )
        timed = Timed(loader, steps, steps * arguments.batch_size)
        data = {"train": SimpleNamespace(dataloader=timed, set_epoch=lambda epoch: None)}
        loss = ClipLoss()
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
        return _steps_between(timed.asked)

    return model, trained


def open_clip_arguments(
    precision: str, batch: int, *, accumulate: int = 1, grad_clip_norm: float | None = 1.0
) -> SimpleNamespace:
    """What its loop reads of its command line."""
    return SimpleNamespace(
        device="cpu",
        precision={"bf16": "amp_bf16", "fp32": "fp32"}[precision],
        accum_freq=accumulate,
        skip_scheduler=True,
        distill=False,
        grad_clip_norm=grad_clip_norm,
        horovod=False,
        log_every_n_steps=10**9,
        batch_size=batch,
        world_size=1,
        rank=0,
        local_rank=0,
        log_local=False,
        wandb=False,
    )


class _OpenClipRows(torch.utils.data.Dataset):
    """As open_clip's CsvDataset: a picture is opened and transformed, a text tokenised, whenever a row is asked for."""

    def __init__(self, work: Work, transform: Any, tokenizer: Any) -> None:
        self.work, self.transform, self.tokenizer = work, transform, tokenizer

    def __len__(self) -> int:
        return len(self.work.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        ids = self.tokenizer(self.work.texts[row], truncation=True, max_length=self.work.limit)["input_ids"]
        padded = torch.zeros(self.work.limit, dtype=torch.long)
        padded[: len(ids)] = torch.tensor(ids)
        return self.transform(Image.open(self.work.files[row])), padded


def transformers_trainer(work: Work) -> tuple[Any, Trained]:
    """transformers' Trainer over its CLIPModel, every text padded to 77 tokens."""
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, Trainer

    model = CLIPModel.from_pretrained(work.model)
    processor, tokenizer = AutoImageProcessor.from_pretrained(work.model), CLIPTokenizer.from_pretrained(work.model)
    rows = _Pictures(work, processor)

    def collated(items: list[dict[str, Any]]) -> dict[str, Any]:
        told = tokenizer(
            [item["text"] for item in items],
            padding="max_length",
            max_length=work.limit,
            truncation=True,
            return_tensors="pt",
        )
        pixels = torch.stack([item["pixel_values"] for item in items])
        return {**told, "pixel_values": pixels, "return_loss": True}

    trained = _by_trainer(
        work,
        lambda arguments, callback, some: Trainer(
            model,
            arguments,
            train_dataset=_Reordered(rows, some),
            data_collator=collated,
            callbacks=[callback],
            optimizers=(_adamw(model, work), None),
        ),
    )
    return model, trained


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, work: Work, processor: Any) -> None:
        self.work, self.processor = work, processor

    def __len__(self) -> int:
        return len(self.work.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        from PIL import Image

        picture = Image.open(self.work.files[row]).convert("RGB")
        pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "text": self.work.texts[row]}


class _Reordered(torch.utils.data.Dataset):
    """Some rows, in this order."""

    def __init__(self, rows: Any, order: Sequence[int]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        return self.rows[self.order[place]]


def sentence_transformers_trainer(work: Work, loss: str = "plain", micro: int = 32) -> tuple[Any, Trained]:
    """sentence-transformers' trainer over its CLIP.

    Args:
        loss: "plain", or "cached" for its two passes in micro-batches.
    """
    from datasets import Dataset, Features, Image, Value
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
    from sentence_transformers.base.modules import Transformer

    model = SentenceTransformer(modules=[Transformer(str(work.model))], device="cpu")
    kinds = Features({"image": Image(), "text": Value("string")})
    if loss == "cached":
        made = losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=micro)
    else:
        made = losses.MultipleNegativesSymmetricRankingLoss(model)

    def rows_of(some: Sequence[int]) -> Any:
        return Dataset.from_dict(
            {"image": [str(work.files[row]) for row in some], "text": [work.texts[row] for row in some]}, features=kinds
        )

    trained = _by_trainer(
        work,
        lambda arguments, callback, some: SentenceTransformerTrainer(
            model,
            arguments,
            train_dataset=rows_of(some),
            loss=made,
            callbacks=[callback],
            optimizers=(_adamw(model, work), None),
        ),
        sentences=True,
    )
    return model, trained


def _by_trainer(work: Work, made: Callable[[Any, Any, list[int]], Any], *, sentences: bool = False) -> Trained:
    import tempfile

    from transformers import TrainerCallback, TrainingArguments

    kind: Any = TrainingArguments
    if sentences:
        from sentence_transformers import SentenceTransformerTrainingArguments

        # It would shuffle, whatever sampling strategy is asked for: the batches are those of all.
        kind = partial(SentenceTransformerTrainingArguments, batch_sampler=_in_order)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    done = 0

    def trained(steps: int) -> list[float]:
        nonlocal done
        # It fetches a batch ahead: without one more the last step would load nothing.
        some = [row for rows in work.order[done : done + steps + 1] for row in rows]
        done += steps
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = kind(
                output_dir=folder,
                per_device_train_batch_size=len(work.order[0]),
                max_steps=steps,
                bf16=work.precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_num_workers=work.workers,
                dataloader_prefetch_factor=1 if work.workers else None,
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                lr_scheduler_type="constant",
                learning_rate=work.lr,
            )
            made(arguments, clock, some).train()
        return [after - before for before, after in pairwise(clock.ends)]

    return trained


def _in_order(dataset: Any, **how: Any) -> Any:
    from sentence_transformers.base.sampler import DefaultBatchSampler

    return DefaultBatchSampler(SequentialSampler(dataset), **how)


def _adamw(model: Any, work: Work) -> torch.optim.AdamW:
    """What Trainer would make by itself, with the rates that all share."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": work.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=work.lr, betas=(0.9, 0.98), fused=True)


def _steps_between(asked: list[float]) -> list[float]:
    """Seconds from one request for a batch to the next; the first step is left out."""
    between = [after - before for before, after in pairwise(asked)]
    return between[1:]


TRAINERS: dict[str, Callable[[Work], tuple[Any, Trained]]] = {
    "open_clip": open_clip_trainer,
    "transformers": transformers_trainer,
    "sentence-transformers": sentence_transformers_trainer,
}
PACKAGES = {
    "open_clip": ("open_clip", "open_clip_train", "torchvision"),
    "transformers": ("transformers", "accelerate"),
    "sentence-transformers": ("sentence_transformers", "datasets"),
}


def installed(names: Sequence[str] = tuple(TRAINERS)) -> tuple[list[str], list[str]]:
    """Those of the peers that are installed, and a sentence for each that is not."""
    lacking = {name: missing(*PACKAGES[name]) for name in names}
    here = [name for name in names if not lacking[name]]
    return here, [f"{name} is left out: {', '.join(gone)} not installed" for name, gone in lacking.items() if gone]
