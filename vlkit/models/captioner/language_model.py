"""A frozen causal language model: loaded in 4 bits, 8 bits or whole; its chat template; the loss of captions.

Any that transformers' AutoModelForCausalLM opens and that takes `inputs_embeds`; Qwen2.5 is the one it is made for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from vlkit.config.data import TINY_LLM
from vlkit.errors import ArtifactError, UsageError
from vlkit.models import loading, quantization
from vlkit.models.device import DTYPES, Precision
from vlkit.models.hub import quiet_transformers, read_config, refuse_unknown, translate_hub_errors
from vlkit.models.tuning import train_mode

Quantize = Literal["nf4", "int8", "none"]
# Stands for the image in a chat template, and is cut out again.
IMAGE_MARK = "<|the picture|>"
# Words that are scored against the whole vocabulary at once.
WORDS_AT_ONCE = 256
ATTENTION_MODULES = r".*\.(self_attn|attn|attention)\.(q_proj|k_proj|v_proj|o_proj|query_key_value|dense|c_attn)"
# Settings that change logits behind the output layer: the loss of such models would be another one.
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class PromptIds:
    """Token ids around the visual tokens; the caption follows `suffix`."""

    prefix: list[int]
    suffix: list[int]


class LanguageModel(torch.nn.Module):
    """A causal language model, frozen but for a LoRA that may be put into it.

    Attributes:
        model: transformers' model.
        peft: the PeftModel around it if it has a LoRA, else None.
        source: hub name or folder that it came from.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.peft: Any = None
        model.requires_grad_(False)
        refuse_changed_logits(model.config, source)
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise UsageError(f"the tokenizer of {source} has no token that ends a text", hint="choose another --llm")
        self.eval()

    @property
    def embeddings(self) -> torch.Tensor:
        """Embeddings of the vocabulary: [words, hidden]."""
        table: torch.Tensor = self.model.get_input_embeddings().weight
        return table

    @property
    def hidden_size(self) -> int:
        """Width of its embeddings."""
        return self.embeddings.shape[1]

    @property
    def context_length(self) -> int:
        """Tokens that it reads at most, the caption included."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @property
    def eos_id(self) -> int:
        """The token that ends a caption."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """The token that pads short captions and is masked."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def has_chat(self) -> bool:
        """It was taught to answer, and its tokenizer knows how to put a question to it."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def train(self, mode: bool = True) -> Self:
        """Switch a LoRA's dropout; what is frozen stays in eval mode."""
        super().train(False)
        if mode and self.peft is not None:
            train_mode(self.model)
        for layer in self._checkpointed_layers():
            # Where activations are computed again, transformers asks the layer itself, and no other module.
            layer.training = mode
        return self

    def _checkpointed_layers(self) -> list[Any]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
        ]

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass: less memory, slower."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def prompt_ids(self, text: str) -> PromptIds:
        """Return a prompt in the model's chat template, behind the image; without a template, as it stands.

        Raises:
            UsageError: the chat template does not let the prompt through as it is.
        """
        if not self.has_chat:
            first = self.tokenizer.bos_token_id
            return PromptIds([] if first is None else [int(first)], self.tokens(f"{text}\n"))
        messages = [{"role": "user", "content": f"{IMAGE_MARK}\n{text}"}]
        if special := [token for token in self.tokenizer.all_special_tokens if token in text]:
            raise UsageError(f"--prompt contains {special[0]}, a special token of {self.source}", hint="leave it out")
        # Models that can think before they answer must not.
        chat = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        prefix, *rest = chat.split(IMAGE_MARK)
        if len(rest) != 1:
            raise UsageError(
                f"the chat template of {self.source} does not keep the user's words", hint="choose another --llm"
            )
        return PromptIds(self.tokens(prefix), self.tokens(rest[0]))

    def tokens(self, text: str) -> list[int]:
        """Return a text's token ids, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def captions(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
        """Return token ids of each caption and its end, at most `limit`; and how many were cut, and lost it."""
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        words = self.tokenizer([text.strip() for text in texts], **options)["input_ids"] if texts else []
        full = [[*ids, self.eos_id] for ids in words]
        return [ids[:limit] for ids in full], sum(len(ids) > limit for ids in full)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [..., length] to embeddings [..., length, hidden]."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def states(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map embeddings [texts, length, hidden] and mask [texts, length] to the last layer's states, as large."""
        decoder = self.model.get_decoder()
        output = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        states: torch.Tensor = output.last_hidden_state
        return states

    def cross_entropy(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum -log p(target) in float32, of states [words, hidden] before the output layer; a scalar.

        The output layer is frozen, and the logits of all words are never held at once: see `_FrozenHead`.
        """
        head = self.model.get_output_embeddings()
        with torch.autocast(states.device.type, enabled=False):
            total: torch.Tensor = _FrozenHead.apply(states, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
            return total

    def identity(self) -> str:
        """Return a hash, the same in any precision, of configuration, vocabulary, chat template and weights."""
        config = {
            k: v
            for k, v in self.model.config.to_dict().items()
            if k not in CONFIG_KEYS_WITHOUT_EFFECT and not k.startswith("_")
        }
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        digest.update(str(self.tokenizer.chat_template).encode())
        for path in _weight_files(self.source):
            _hash_samples(path, digest)
        return digest.hexdigest()

    def insert_lora(self, *, rank: int, alpha: float, dropout: float, seed: int) -> None:
        """Put adapters on its attention layers, the only part of it that is then trained.

        Raises:
            UsageError: vlkit does not know this model's attention layers.
        """
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=ATTENTION_MODULES,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.peft = get_peft_model(self.model, lora)
            except ValueError as error:
                kind = self.model.config.model_type
                raise UsageError(f"--llm-lora: vlkit does not know the attention layers of a {kind} model") from error

    def load_lora(self, folder: Path) -> None:
        """Put a LoRA back that `peft.save_pretrained` wrote."""
        from peft import PeftModel

        try:
            self.peft = PeftModel.from_pretrained(self.model, folder)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            message = f"{folder} is damaged, or does not fit {self.source}: {str(error).splitlines()[0]}"
            raise ArtifactError(message, hint="restore it from a copy, or train again") from None
        self.model.requires_grad_(False)


# Of a configuration: how it was loaded, and what only generation uses.
CONFIG_KEYS_WITHOUT_EFFECT = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "architectures",
    "use_cache",
)


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy behind a frozen output layer, a few words at a time.

    The gradient at a word's state is (softmax - one-hot) W, which needs no other word: the forward pass computes it
    chunk by chunk, and no logits are kept (as in Liger-Kernel's fused loss, arXiv 2410.10989, without its own kernels).
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=states.device)
        # In float32 until the loss scale of fp16 has been multiplied in.
        gradient = torch.empty_like(states, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        ctx.dtype = states.dtype
        for start in range(0, len(states), WORDS_AT_ONCE):
            chunk, labels = (
                states[start : start + WORDS_AT_ONCE].to(weight.dtype),
                targets[start : start + WORDS_AT_ONCE],
            )
            logits = F.linear(chunk, weight, bias).float()
            log_p = logits.log_softmax(dim=-1)
            total -= log_p.gather(1, labels[:, None]).sum()
            if gradient is not None:
                difference = log_p.exp_()
                difference[torch.arange(len(labels), device=difference.device), labels] -= 1
                gradient[start : start + WORDS_AT_ONCE] = (difference.to(weight.dtype) @ weight).float()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(ctx.dtype), None, None, None


def _weight_files(source: str) -> list[Path]:
    """Return the files of a model's weights: in its folder, or in the hub's cache."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
        folder = Path(path).parent if path else folder
    return [path for pattern in ("*.safetensors", "*.bin") for path in sorted(folder.glob(pattern))]


def _hash_samples(path: Path, digest: Any, blocks: int = 1024, size: int = 4096) -> None:
    """Add a file to a digest: its length, its beginning with all names and shapes, and blocks spread over it.

    Reading all of it would take seconds a gigabyte; training, or a merged adapter, changes weights everywhere.
    """
    length = path.stat().st_size
    digest.update(str(length).encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        for block in range(blocks):
            file.seek(length * block // blocks)
            digest.update(file.read(size))


def refuse_changed_logits(config: Any, name: str) -> None:
    """Refuse a model that changes its logits: its loss would not be the one that is computed here."""
    for key in LOGIT_CHANGES:
        value = getattr(config, key, None)
        if value not in (None, 1, 1.0, 0, 0.0):
            raise UsageError(
                f"{name} changes its logits ({key} {value}), which vlkit does not support", hint="choose another --llm"
            )


def llm_config(name: str) -> Any:
    """Read transformers' configuration of a language model.

    Raises:
        UsageError: no such model, or one that writes no text.
    """
    transformers = quiet_transformers()
    refuse_unknown(name, (TINY_LLM,), "Qwen/Qwen2.5-1.5B-Instruct")
    config = read_config(name)
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        message = f"{name} is a {config.model_type} model, which writes no text"
        raise UsageError(message, hint="--llm takes a causal language model, such as Qwen/Qwen2.5-1.5B-Instruct")
    return config


def load_llm(name: str, *, quantize: Quantize, precision: Precision) -> LanguageModel:
    """Load a language model by hub name or folder, frozen, in eval mode.

    Args:
        quantize: nf4 and int8 put it on the device that it will be used on.
        precision: of its products, and of the weights that are not quantised.

    Raises:
        UsageError: no such model, or none that vlkit can use.
        NetworkError, ArtifactError: see `loading.load_dual_encoder`.
    """
    llm_config(name)
    transformers = quiet_transformers()
    with translate_hub_errors(name):
        options = {} if quantize == "none" else quantization.loading_options(precision, quantize, keep=None)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[precision], output_loading_info=True, **options
        )
        quantization.keep_weights_unpacked(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    loading.refuse_missing_weights(name, report["missing_keys"])
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ArtifactError(f"{name}: its tokenizer knows {len(tokenizer)} tokens, more than its model")
    return LanguageModel(model, tokenizer, name)


def llm_on_meta(config: Any) -> LanguageModel:
    """Return the model of a configuration on the meta device: shapes and counts, without a byte of weights."""
    with torch.device("meta"):
        return LanguageModel(quiet_transformers().AutoModelForCausalLM.from_config(config), None, "meta")
