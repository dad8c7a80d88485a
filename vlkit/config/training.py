"""Every setting of every command, written once.

One flat frozen dataclass per command. The command line's flags (`flags.py`), the keys of a YAML file and the snapshot
in a run folder all come from its fields: a name, a type, a help text, a default. Where the default is None the value
depends on the data or the model and is filled in before the work starts, so that a snapshot is always complete.

Precedence: default < model preset < domain preset < YAML < flag; `presets.py` lays them over one another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import Settings
from vlkit.config.checks import require_above, require_at_least, require_between, require_cache
from vlkit.config.data import Decode, ImageAugmentSettings
from vlkit.errors import UsageError
from vlkit.storage import Location

RUNS = Location("runs")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """What every trainer has."""

    data: Annotated[Location | None, "prepared folder (default: the only one under data/); s3:// too"] = None
    name: Annotated[str | None, "name of the run (default: date, time, command and data)"] = None
    runs_dir: Annotated[Location, "folder of the runs; s3:// gets a copy of what is kept under runs/"] = RUNS
    steps: Annotated[int | None, "optimizer steps"] = None
    epochs: Annotated[float | None, "passes over the training rows, instead of --steps"] = None
    batch_size: Annotated[
        int | None, "pairs a batch: what is contrasted with each other (default: by model, at most all rows)"
    ] = None
    micro_batch: Annotated[
        str | None,
        "embed this many at a time: a large batch in the memory of a small one, with the same result; auto: half as "
        "many whenever memory runs out",
    ] = None
    grad_accum: Annotated[int, "batches whose gradients make one step"] = 1
    lr: Annotated[float | None, "peak learning rate (default: 1e-5, LoRA 1e-4, by preset)"] = None
    weight_decay: Annotated[float, "AdamW's, on matrices only"] = 0.01
    warmup: Annotated[float, "steps of linear warm-up; below 1: share of all steps"] = 0.05
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0
    extend_to: Annotated[
        int | None, "go on with a finished run, to this many steps in all: a new warm-up and cosine over those to come"
    ] = None
    legs: Annotated[
        tuple[int, ...], "for snapshots: steps at which the run had ended before --extend-to went on with it"
    ] = ()
    replay: Annotated[
        int | None,
        "take this step of a run again, which stays as it is: its pairs and loss, beside what was recorded",
    ] = None
    max_bad_steps: Annotated[
        int, "end after this many steps in a row without a finite loss and gradient; none of them touches a weight"
    ] = 3
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, "of the matrix products (default: what the device does best)"
    ] = None
    decode: Annotated[
        Decode,
        "how pictures are read: exact, as transformers does in Pillow; fast, as it does with torchvision, within 1 of "
        "255; reduced, large JPEGs at a part of their size, photographs within 10 of 255",
    ] = "fast"
    seed: Annotated[int, "decides order, initial weights and dropout"] = 42
    workers: Annotated[
        int | None, "processes that load batches (default: by size of the data); never changes a result"
    ] = None
    eval_every: Annotated[
        int | None, "steps between evaluations on validation; 0: once an epoch (default: a tenth of all)"
    ] = None
    patience: Annotated[
        int | None, "end after this many evaluations on validation without a better one (default: never)"
    ] = None
    save_every: Annotated[int | None, "steps between checkpoints (default: as --eval-every)"] = None
    keep: Annotated[int, "newest checkpoints to keep, beside the best"] = 2
    limit: Annotated[int | None, "use about this many rows of each split, drawn by the seed"] = None
    deterministic: Annotated[bool, "torch's deterministic algorithms only"] = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "grad_accum", "save_every", "keep", "limit", "max_bad_steps", "extend_to", "replay")
        require_at_least(self, 1, "patience")
        require_at_least(self, 0, "eval_every", "workers", "weight_decay", "warmup", "seed")
        require_above(self, 0, "epochs", "lr", "max_grad_norm")
        if self.micro_batch not in (None, "auto") and not re.fullmatch("[1-9][0-9]*", self.micro_batch):
            raise UsageError(f"--micro-batch {self.micro_batch} is neither a number from 1 on nor auto")
        if list(self.legs) != sorted({*self.legs}) or (self.steps and any(leg >= self.steps for leg in self.legs)):
            raise UsageError(f"--legs {','.join(map(str, self.legs))}: steps below --steps, in their order")
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise UsageError(
                f"--name {self.name!r} is not the name of a folder", hint="letters, digits, '-', '_' and '.' will do"
            )


@dataclass(frozen=True, kw_only=True)
class TrainRetrievalConfig(TrainingConfig):
    """`vlkit train-retrieval`."""

    model: Annotated[str, "hub name, local folder, tiny-siglip or tiny-clip"] = "google/siglip-base-patch16-224"
    init_from: Annotated[Path | None, "finished run: the new one begins with a copy of its weights"] = None
    text_model: Annotated[
        str | None,
        "a text encoder beside the model's vision tower, with its own tokenizer: any that AutoModel opens, such as "
        "FacebookAI/xlm-roberta-base, or tiny-xlmr",
    ] = None
    loss: Annotated[Literal["sigmoid", "softmax"] | None, "default: sigmoid for SigLIP, softmax for CLIP"] = None
    labels: Annotated[Literal["eye", "multi-positive", "mask"], "what counts as a match within a batch"] = (
        "multi-positive"
    )
    tune: Annotated[
        Literal["full", "last", "lora", "text", "image", "head"],
        "what is trained: all, upper layers, adapters, one tower, or what stands behind the encoders; logit scale and "
        "bias always are",
    ] = "full"
    towers: Annotated[Literal["both", "image", "text"], "with --tune full, last, lora, head: in which towers"] = "both"
    trainable: Annotated[
        tuple[str, ...], "of what --tune chose only parameters of these names: '*self_attn*,*projection*'"
    ] = ()
    unfreeze_layers: Annotated[int, "with --tune last: upper layers of each tower that are trained"] = 2
    lora_targets: Annotated[tuple[str, ...], "with --tune lora: attention projections of the encoder layers"] = (
        "q",
        "k",
        "v",
        "out",
    )
    lora_rank: Annotated[int, "with --tune lora"] = 8
    lora_alpha: Annotated[float, "with --tune lora: the update is scaled by alpha / rank"] = 16.0
    lora_dropout: Annotated[float, "with --tune lora"] = 0.05
    quantize: Annotated[Literal["nf4"] | None, "with --tune lora: the frozen base in 4 bits (QLoRA)"] = None
    merge: Annotated[bool, "with --tune lora: write model/ too, with the adapters merged into its weights"] = False
    head_lr: Annotated[float | None, "peak rate of what stands behind the encoders (default: --lr)"] = None
    logit_lr: Annotated[float | None, "peak rate of logit scale and bias (default: --lr)"] = None
    interpolate: Annotated[
        bool, "at the end, go from the untouched to the tuned weights in tenths and keep what validation prefers"
    ] = False
    guard: Annotated[
        Location | None, "prepared folder of a general kind: say how much of it is retained; nothing is chosen by it"
    ] = None
    cache: Annotated[
        str,
        "compute what the frozen parts make of a picture or text once, and keep it: off, auto (under ~/.cache/vlkit, "
        "where it pays), or a folder",
    ] = "auto"
    checkpoint_activations: Annotated[bool, "compute activations again in the backward pass: less memory, slower"] = (
        False
    )
    augment: Annotated[
        ImageAugmentSettings | None, "vary pictures anew in every epoch, with the settings of an augmentation YAML"
    ] = None
    negatives: Annotated[bool, "contrast pictures with the wrong texts that augment chose for them, too"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "unfreeze_layers", "lora_rank")
        if self.batch_size is not None and self.batch_size < 2:
            raise UsageError(
                f"--batch-size {self.batch_size}: a batch of one contrasts a pair with nothing",
                hint="give it at least 2",
            )
        if self.tune in ("text", "image") and self.towers not in ("both", self.tune):
            raise UsageError(f"--tune {self.tune} --towers {self.towers}: these are two different towers")
        if self.merge and self.tune != "lora":
            raise UsageError(f"--merge merges a LoRA; with --tune {self.tune} there is none")
        require_cache(self.cache)
        if self.init_from and self.text_model:
            raise UsageError("--init-from takes its text encoder from the run: leave out --text-model")
        if self.quantize and self.tune != "lora":
            told = f"--quantize {self.quantize} with --tune {self.tune}: weights in 4 bits cannot be trained"
            raise UsageError(told, hint="--tune lora trains adapters on them")
        if self.quantize and self.merge:
            told = "--merge with --quantize: adapters that were trained on rounded weights do not fit the whole ones"
            raise UsageError(told, hint="leave out --merge; adapter/ opens on the base in 4 bits")
        if self.quantize and self.text_model:
            raise UsageError("--quantize with --text-model: a pair is trained in full precision")
        require_above(self, 0, "head_lr", "logit_lr")
        require_between(self, 0.0, 0.99, "lora_dropout")
        unknown = set(self.lora_targets) - {"q", "k", "v", "out"}
        if unknown or not self.lora_targets:
            raise UsageError(f"--lora-targets {','.join(self.lora_targets)}: choose from q, k, v, out")
