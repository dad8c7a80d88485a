"""The settings that both trainers share, and those of train-retrieval.

One flat frozen dataclass per command. The command line's flags (`flags.py`), the keys of a YAML file and the snapshot
in a run folder all come from its fields: a name, a type, a help text, a default. A default of None depends on the data
or the model and is filled in before training starts, so that a snapshot is always complete.

Precedence: default < model preset < domain preset < YAML < flag; `presets.py` lays them over one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlkit.config.base import Settings, requires
from vlkit.config.checks import require_above, require_at_least, require_between, require_cache
from vlkit.config.data import Decode, ImageAugmentSettings
from vlkit.errors import UsageError
from vlkit.storage import Location

RUNS = Location("runs")
# Rows that are embedded with gradients at once; auto: all, and half as many whenever memory runs out; None: all.
MicroBatch = int | Literal["auto"] | None
LORA_TARGETS = ("q", "k", "v", "out")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """What both trainers have."""

    data: Annotated[Location | None, "prepared folder (default: the only one under data/); s3:// too"] = None
    name: Annotated[str | None, "name of the run (default: date, time, command and data)"] = None
    runs_dir: Annotated[Location, "folder of the runs; s3:// gets a copy of runs/"] = RUNS
    steps: Annotated[int | None, "optimizer steps"] = None
    epochs: Annotated[float | None, "passes over the training rows, instead of --steps"] = None
    batch_size: Annotated[
        int | None, "pairs per batch, contrasted with each other (default: by model, at most all rows)"
    ] = None
    micro_batch: Annotated[
        MicroBatch,
        "rows embedded at once (gradient caching): same gradients, less memory; auto halves it when memory runs out",
    ] = None
    grad_accum: Annotated[int, "batches per optimizer step (gradient accumulation)"] = 1
    lr: Annotated[float | None, "peak learning rate (default: by preset, else 1e-5, LoRA 1e-4)"] = None
    weight_decay: Annotated[float, "AdamW's weight decay, on matrices only"] = 0.01
    warmup: Annotated[float, "steps of linear warm-up; below 1: share of all steps"] = 0.05
    max_grad_norm: Annotated[float, "norm that gradients are clipped to"] = 1.0
    extend_to: Annotated[
        int | None, "continue a finished run to this many steps in all, with a new warm-up and cosine"
    ] = None
    legs: Annotated[
        tuple[int, ...],
        "steps at which the run ended before each extension; written by --extend-to, not for the command line",
    ] = ()
    replay: Annotated[
        int | None, "repeat this step of a run, which stays as it is: print its pairs and loss beside the recorded ones"
    ] = None
    max_bad_steps: Annotated[
        int, "stop after this many steps in a row with a non-finite loss or gradient; none of them changes a weight"
    ] = 3
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, "precision of matrix products (default: the device's best)"
    ] = None
    decode: Annotated[
        Decode,
        "how images are read: exact, as transformers does with Pillow; fast, as it does with torchvision, within 1 of "
        "255; reduced, large JPEGs at a fraction of their size, photographs within 10 of 255",
    ] = "fast"
    seed: Annotated[int, "seed of order, initial weights and dropout"] = 42
    workers: Annotated[
        int | None, "processes that load batches (default: by size of the data); never changes a result"
    ] = None
    eval_every: Annotated[
        int | None, "steps between evaluations on validation; 0: once an epoch (default: a tenth of all steps)"
    ] = None
    patience: Annotated[
        int | None, "stop after this many evaluations on validation without a better one (default: never)"
    ] = None
    save_every: Annotated[int | None, "steps between checkpoints (default: --eval-every)"] = None
    keep: Annotated[int, "newest checkpoints to keep, beside the best"] = 2
    limit: Annotated[int | None, "use about this many rows of each split, drawn by the seed"] = None
    deterministic: Annotated[bool, "use only torch's deterministic algorithms"] = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "grad_accum", "save_every", "keep", "limit", "max_bad_steps", "extend_to")
        require_at_least(self, 1, "patience", "replay")
        require_at_least(self, 0, "eval_every", "workers", "weight_decay", "warmup", "seed")
        require_above(self, 0, "epochs", "lr", "max_grad_norm")
        if self.micro_batch != "auto":
            require_at_least(self, 1, "micro_batch")
        if list(self.legs) != sorted({*self.legs}) or (self.steps and any(leg >= self.steps for leg in self.legs)):
            raise UsageError(f"--legs {','.join(map(str, self.legs))} must be rising steps below --steps")
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            hint = "use letters, digits, '-', '_' and '.'"
            raise UsageError(f"--name {self.name!r} is not the name of a folder", hint=hint)


@dataclass(frozen=True, kw_only=True)
class TrainRetrievalConfig(TrainingConfig):
    """`vlkit train-retrieval`."""

    model: Annotated[str, "hub name, local folder, tiny-siglip or tiny-clip"] = "google/siglip-base-patch16-224"
    init_from: Annotated[Path | None, "finished run whose weights the new run starts from"] = None
    text_model: Annotated[
        str | None,
        "text encoder to pair with the model's vision tower, with its own tokenizer: any that AutoModel opens, such as "
        "FacebookAI/xlm-roberta-base, or tiny-xlmr",
    ] = None
    loss: Annotated[
        Literal["sigmoid", "softmax"] | None, "contrastive loss (default: sigmoid for SigLIP, softmax for CLIP)"
    ] = None
    labels: Annotated[Literal["eye", "multi-positive", "mask"], "what counts as a match within a batch"] = (
        "multi-positive"
    )
    tune: Annotated[
        Literal["full", "last", "lora", "text", "image", "head"],
        "what to train: all weights, upper layers, LoRA adapters, one tower, or the heads (what follows the encoder "
        "layers); always with logit scale and bias",
    ] = "full"
    towers: Annotated[Literal["both", "image", "text"], "towers that --tune full, last, lora or head trains"] = "both"
    trainable: Annotated[
        tuple[str, ...], "train only parameters with these names among those of --tune: '*self_attn*,*projection*'"
    ] = ()
    unfreeze_layers: Annotated[int, "upper layers of each tower that --tune last trains", requires("tune", "last")] = 2
    lora_targets: Annotated[
        tuple[str, ...], "attention projections that --tune lora adapts", requires("tune", "lora")
    ] = LORA_TARGETS
    lora_rank: Annotated[int, "rank of the adapters of --tune lora", requires("tune", "lora")] = 8
    lora_alpha: Annotated[float, "scale of the adapters of --tune lora: alpha / rank", requires("tune", "lora")] = 16.0
    lora_dropout: Annotated[float, "dropout of the adapters of --tune lora", requires("tune", "lora")] = 0.05
    quantize: Annotated[Literal["nf4"] | None, "with --tune lora: load the frozen base model in 4 bits (QLoRA)"] = None
    merge: Annotated[
        bool,
        "with --tune lora: also write model/, with the adapters merged into the weights",
        requires("tune", "lora"),
    ] = False
    head_lr: Annotated[float | None, "peak learning rate of the heads (default: --lr)"] = None
    logit_lr: Annotated[float | None, "peak learning rate of logit scale and bias (default: --lr)"] = None
    interpolate: Annotated[
        bool, "at the end, try weights between untouched and tuned in tenths and keep the best on validation"
    ] = False
    guard: Annotated[
        Location | None, "prepared folder of general data: report how much is retained; nothing is chosen by it"
    ] = None
    cache: Annotated[
        str, "reuse outputs of the frozen parts: off, auto (under ~/.cache/vlkit, where it pays), or a folder"
    ] = "auto"
    checkpoint_activations: Annotated[bool, "recompute activations in the backward pass: less memory, slower"] = False
    augment: Annotated[
        ImageAugmentSettings | None, "vary images anew in every epoch, with the settings of an augmentation YAML"
    ] = None
    negatives: Annotated[bool, "contrast images with the non-matching texts that augment added"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "unfreeze_layers", "lora_rank")
        if self.batch_size is not None and self.batch_size < 2:
            message = f"--batch-size {self.batch_size}: one pair has nothing to be contrasted with"
            raise UsageError(message, hint="give at least 2")
        require_cache(self.cache)
        require_above(self, 0, "head_lr", "logit_lr")
        require_between(self, 0.0, 0.99, "lora_dropout")
        if set(self.lora_targets) - set(LORA_TARGETS) or not self.lora_targets:
            raise UsageError(f"--lora-targets {','.join(self.lora_targets)}: choose from {', '.join(LORA_TARGETS)}")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.tune in ("text", "image") and self.towers not in ("both", self.tune):
            raise UsageError(f"--tune {self.tune} and --towers {self.towers} name two different towers")
        if self.init_from and self.text_model:
            raise UsageError("--init-from takes the text encoder from the run", hint="leave out --text-model")
        if self.quantize and self.tune != "lora":
            message = f"--quantize {self.quantize} with --tune {self.tune}: weights in 4 bits cannot be trained"
            raise UsageError(message, hint="--tune lora trains adapters on them")
        if self.quantize and self.merge:
            message = "--merge with --quantize: adapters trained on 4-bit weights do not fit the unquantized ones"
            raise UsageError(message, hint="leave out --merge; adapter/ opens on the 4-bit base model")
        if self.quantize and self.text_model:
            raise UsageError("--quantize with --text-model: a model with its own text encoder cannot be quantized")
