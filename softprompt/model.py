"""The frozen base, the prompt in front of it, and the plain engine: padded rows through the base's own forward."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softprompt import hub
from softprompt.batching import Batch, chunks, collate_padded
from softprompt.capabilities import check_positions, check_takes_prompt, layers_and_heads, max_positions
from softprompt.data import Example, count_targets
from softprompt.errors import ConfigError, ModelError
from softprompt.loss import cross_entropy_sum
from softprompt.memory import is_out_of_memory
from softprompt.prompt import PromptEmbedding

PROBED = 5  # tokens that a base is run on when it is loaded
_checked: WeakSet[nn.Module] = WeakSet()  # bases that passed `check_forward`, which are not run again


class Engine(Protocol):
    """The one door between the loop and a model: a window of rows goes in; the summed loss and the target count come
    out, and the prompt's gradient has been accumulated. How a window is cut, padded or packed, moved to a device, and
    where the base's weights come from is behind it."""

    device: torch.device
    compute_dtype: torch.dtype

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        """Add grad_scale · ∂(summed loss)/∂prompt to `prompt.weight.grad` [P, H] fp32.

        Returns the summed loss (fp64 scalar, detached, on the device, not yet awaited) and the number of targets."""
        ...

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        """The same sums without a gradient over any number of rows, for a prompt [P, H] or for the bare base (None)."""
        ...

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        """The summed loss of each row by itself: less the log-likelihood of its targets."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to add up a window in the same order, JSON-able."""
        ...

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        """About what memory a step over `window` takes above the base's, for P virtual tokens."""
        ...


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` → a device that is there.

    Raises:
        ConfigError: CUDA asked for where there is none, or a card of a number that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch finds no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def resolve_dtype(device: torch.device, bf16: bool | None, fp16: bool | None) -> torch.dtype:
    """The dtype of matrix products: what is asked for; else fp32 on the CPU, and on CUDA bf16 where the card has it,
    else fp16. Saying `false` to one of them without saying `true` to the other asks for fp32."""
    if bf16 or fp16:
        return torch.bfloat16 if bf16 else torch.float16
    if device.type == "cpu" or bf16 is False or fp16 is False:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizer(name_or_path: str) -> Any:
    """The base's tokenizer; a missing pad token is the end token, whose labels are masked anyway.

    Raises:
        ModelError: the base or its tokenizer is not there or not loadable, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = from_hub_or_folder(AutoTokenizer, name_or_path, "tokenizer")
    except ModelError:
        base_config(name_or_path)  # where there is no base, or none that fits, that is what to say
        raise
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name_or_path}: its tokenizer has no eos_token, so an answer would have no end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(name_or_path: str) -> Any:
    """The configuration of a base, which is all that it takes to see that it cannot be one.

    Raises:
        ModelError: not there, not loadable, quantised, or no causal language model of transformers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = from_hub_or_folder(AutoConfig, name_or_path, "base model")
    named = f"{name_or_path}: a model of type {config.model_type}"
    wanted = "give --model_name_or_path a causal one (BLOOM, Llama, Qwen, …)"
    for one in (config, config.get_text_config()):
        if quantization := getattr(one, "quantization_config", None) or getattr(one, "compression_config", None):
            raise _quantised(name_or_path, config.model_type, quantization)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{named} has an encoder and a decoder, and prompts are learned for a decoder alone; {wanted}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{named} is an encoder, whose words see the words after them; {wanted}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{named} is no causal language model of transformers; {wanted}")
    return config


def _quantised(name: str, model_type: str, quantization: Any) -> ModelError:
    given = quantization if isinstance(quantization, dict) else vars(quantization)
    method = getattr(given.get("quant_method"), "value", given.get("quant_method")) or "by an unknown method"
    instead = ", which --load_in_4bit of train.py and infer.py quantises as it loads it"
    return ModelError(
        f"{name}: its weights are stored quantised ({method}), and prompts are learned over weights that are not; give "
        f"--model_name_or_path the unquantised base{instead if model_type == 'bloom' else ''}"
    )


def refuse_quantised(base: PreTrainedModel) -> None:
    """Raises ModelError where transformers loaded a base's weights quantised: to cast them leaves their scales out."""
    if getattr(base, "hf_quantizer", None) is not None:
        name, method = str(base.name_or_path), getattr(base.hf_quantizer, "quantization_config", None)
        raise _quantised(name, base.config.model_type, method or {})


def load_base(name_or_path: str, device: torch.device, compute_dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model, frozen and in eval mode: `read_base`, then `freeze`.

    Raises:
        ModelError: as of `read_base`.
    """
    return place(freeze(read_base(name_or_path), compute_dtype), device)


def read_base(name_or_path: str) -> PreTrainedModel:
    """A causal language model on the CPU, its weights as they are in its files.

    Raises:
        ModelError: as of `base_config`, or as of `capabilities.check_takes_prompt`.
    """
    from transformers import AutoModelForCausalLM

    base_config(name_or_path)
    base = cast(PreTrainedModel, from_hub_or_folder(AutoModelForCausalLM, name_or_path, "base model", dtype="auto"))
    check_takes_prompt(base, name_or_path)
    return base


def weight_files(name_or_path: str) -> list[Path]:
    """The files of a base's weights, in its folder or in the hub's cache; none where they are not found."""
    from huggingface_hub import try_to_load_from_cache

    if not os.path.isdir(name_or_path):
        config = try_to_load_from_cache(name_or_path, "config.json")
        if not isinstance(config, str):
            return []
        name_or_path = os.path.dirname(config)
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(name_or_path).glob(pattern))


def word_embeddings(base: PreTrainedModel) -> nn.Embedding:
    """The base's embedding of words, weight [V, H]."""
    return cast(nn.Embedding, base.get_input_embeddings())


class EmbeddedWords:
    """What the base makes of its words before its first block, [V, H] in the dtype of its embeddings: indexing by token
    ids [n] int64 calls the embedding module, which may do more than look up rows of its table (Gemma's scales them)."""

    def __init__(self, base: PreTrainedModel):
        self._embed = cast(nn.Embedding, base.get_input_embeddings())
        self.shape, self.device = self._embed.weight.shape, self._embed.weight.device

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self._embed(ids))


def freeze(base: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Freeze `base` in place and put it in eval mode.

    Matrices are kept in `compute_dtype`: autocast would cast them to it at every use, with the same result. All else
    (embeddings, norms, biases, a tied head) is fp32, whatever dtype the files have.

    Raises:
        ModelError: a base that transformers loaded quantised.
    """
    refuse_quantised(base)
    base.requires_grad_(False).eval()
    matrices = {id(matrix) for module in base.modules() for matrix in _matrices(module)}
    matrices.discard(id(word_embeddings(base).weight))
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype if id(parameter) in matrices else torch.float32)
    return base


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that only enter matrix products: the weights [out, in] of linear layers, [in, out] of
    GPT-2's Conv1D, and experts' in one tensor [experts, …, …]. Routers are small, and some are to stay in fp32.

    transformers' grouped product of experts is not under autocast: it takes the dtype of its weights, which is thereby
    the compute dtype, as for all other products."""
    if isinstance(module, nn.Linear | Conv1D):
        yield module.weight
    elif not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        yield from (p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1)


def place(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move `base` to a device in place, but for what is on the meta device."""
    for tensor in (*base.parameters(), *base.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    return base


def from_hub_or_folder(auto_class: Any, name_or_path: str, what: str, **kwargs: Any) -> Any:
    """What an Auto class of transformers loads from a folder or the hub.

    Raises:
        ModelError: `what` is not there or cannot be loaded.
    """
    from transformers.utils import logging

    looked = ""
    if not os.path.isdir(name_or_path):
        place = os.path.abspath(name_or_path)
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or os.path.exists(place):
            raise ModelError(
                f"{what} {name_or_path!r}: no such folder (looked for {place}); give --model_name_or_path a folder or "
                "a hub id"
            )
        looked = f", neither from the folder {place}, which is not there, nor from the hub"
        hub.prepare()
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except Exception as error:  # OSError, ValueError, safetensors' and huggingface_hub's own: all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        was_read = isinstance(error, ValueError | KeyError | ImportError) and not isinstance(error, OSError)
        if not looked or was_read:  # no hub would help
            raise ModelError(f"{what} {name_or_path!r} cannot be loaded: {reason}") from None
        raise ModelError(f"{what} {name_or_path!r} cannot be loaded{looked}: {reason} ({hub.way_out()})") from None
    finally:
        logging.enable_progress_bar()


def prepend(
    prompt: Tensor, embeddings: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the prompt [P, H] in front of every row: virtual tokens are attended to and are no targets.

    Args:
        embeddings: [B, T, H]; attention_mask and labels: [B, T] int64.
    Returns:
        embeddings [B, P+T, H] in the given embeddings' dtype, attention mask and labels [B, P+T] int64.
    """
    rows = embeddings.shape[0]
    front = prompt.to(embeddings.dtype).expand(rows, -1, -1)  # [B, P, H]
    side = attention_mask.new_ones(rows, prompt.shape[0])  # [B, P]
    return (
        torch.cat([front, embeddings], dim=1),
        torch.cat([side, attention_mask], dim=1),
        torch.cat([torch.full_like(side, -100), labels], dim=1),
    )


def padded_forward(base: PreTrainedModel, prompt: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The base's own forward over padded rows with the prompt [P, H] before each; P = 0 is the bare base.

    Padding stands behind the text, so a token's place in its row is its position, which is what transformers assumes
    where it is not told otherwise.

    Returns:
        logits [B, P+T, V] in the dtype of the base's head, labels [B, P+T] int64.
    """
    words = word_embeddings(base)(batch.input_ids)  # [B, T, H]
    embeddings, mask, labels = prepend(prompt, words, batch.attention_mask, batch.labels)
    return base(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits, labels


@torch.no_grad()
def check_forward(base: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Compare `padded_forward` without a prompt with the base's own forward over the same words, at a few tokens. The
    base sees one more word: it must not change the logits before it. BLOOM, whose forward is known, is not run.

    Raises:
        ModelError: the logits differ, so this base does more with a word than to look up its embedding, counts
            positions from elsewhere or looks at later words; or it cannot be run.
    """
    if base.config.model_type == "bloom" or base in _checked:
        return
    kind, words = type(base).__name__, word_embeddings(base).weight
    ids = torch.arange(max(0, min(8, len(words) - PROBED)), len(words))[:PROBED].to(words.device)[None]  # [1, T]
    mask = torch.ones_like(ids)
    try:
        with autocast(words.device, compute_dtype):
            own = base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            ours, _ = padded_forward(base, words[:0], Batch(ids[:, :-1], mask[:, :-1], mask[:, :-1]))
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{base.name_or_path}: {kind} cannot be run on embeddings: {reason}") from None
    off, size = (own - ours.float()).abs().max().item(), own.abs().max().item()
    if not off <= (1e-3 if compute_dtype is torch.float32 else 5e-2) * size:  # NaN is refused, too
        raise ModelError(
            f"{base.name_or_path}: {kind} gives other logits on word embeddings than on the words (off by {off:.2g} of "
            f"{size:.2g}): it does more with a word than to look it up, or looks at later words; take another base"
        )
    _checked.add(base)


class SoftPromptedModel(nn.Module):
    """A frozen base with a prompt before it: what `--print_model` shows and what the parameter line counts."""

    def __init__(self, prompt: PromptEmbedding, base: PreTrainedModel):
        super().__init__()
        self.prompt = prompt
        self.base = base

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels as of `padded_forward`."""
        return padded_forward(self.base, self.prompt(), batch)

    def trainable_parameters_line(self) -> str:
        """The line that PEFT's `print_trainable_parameters` prints."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        return f"trainable params: {trainable:,} || all params: {whole:,} || trainable%: {100 * trainable / whole:.4f}"


class PaddedEngine:
    """The plain engine, for any causal language model: a window is cut into micro-batches of `rows_per_microbatch`
    rows (in evaluation `rows_per_eval_batch`), each padded to its longest, and run through the base's own forward under
    autocast."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        rows_per_microbatch: int,
        compute_dtype: torch.dtype,
        rows_per_eval_batch: int | None = None,
    ):
        """Raises ModelError as of `check_forward`."""
        check_forward(base, compute_dtype)
        self.base = base
        self.compute_dtype = compute_dtype
        self.device = word_embeddings(base).weight.device
        self.rows_per_microbatch = rows_per_microbatch
        self.rows_per_eval_batch = rows_per_eval_batch or rows_per_microbatch
        self.pad_token_id = tokenizer.pad_token_id
        self.max_positions = max_positions(base)

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for rows in chunks(window, self.rows_per_microbatch):
            loss = self._loss(prompt(), rows)
            (loss * grad_scale).backward()
            total += loss.detach()
        return total, sum(map(count_targets, window))

    @torch.no_grad()
    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        front = word_embeddings(self.base).weight[:0] if prompt is None else prompt.to(self.device)  # [P, H]
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for some in chunks(rows, self.rows_per_eval_batch):
            total += self._loss(front, some)
        return total, sum(map(count_targets, rows))

    @torch.no_grad()
    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        front = word_embeddings(self.base).weight[:0] if prompt is None else prompt.to(self.device)  # [P, H]
        sums: list[float] = []
        for some in chunks(rows, self.rows_per_eval_batch):
            batch = self._collated(len(front), some)
            with autocast(self.device, self.compute_dtype):
                logits, labels = padded_forward(self.base, front, batch)
            each = zip(logits[:, None], labels[:, None], strict=True)  # [1, P+T, V], [1, P+T]
            sums += [cross_entropy_sum(*row).item() for row in each]
        return sums

    def state(self) -> dict[str, Any]:
        return {}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        size, words = self.compute_dtype.itemsize, word_embeddings(self.base)
        L, N = layers_and_heads(self.base.config)
        H, V = words.embedding_dim, words.num_embeddings
        width = P + max((len(e.input_ids) for e in window), default=0)
        layer = 4 * 6 * H + size * 16 * H + (4 + size) * N * width  # eager attention's scores
        return min(self.rows_per_microbatch, len(window)) * width * (L * layer + 3 * 4 * V)

    def __str__(self) -> str:
        return "padded engine"

    def _collated(self, P: int, rows: Sequence[Example]) -> Batch:
        """Raises ConfigError where a row behind P virtual tokens needs more positions than the base has."""
        check_positions(self.max_positions, P, max(len(row.input_ids) for row in rows), "a row")
        return collate_padded(rows, self.pad_token_id).to(self.device)

    def _loss(self, prompt: Tensor, rows: Sequence[Example]) -> Tensor:
        batch = self._collated(len(prompt), rows)
        with autocast(self.device, self.compute_dtype):
            return cross_entropy_sum(*padded_forward(self.base, prompt, batch))


def autocast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `compute_dtype`; nothing is cast where that is fp32."""
    return torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not torch.float32)
