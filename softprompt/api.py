"""For notebooks and scripts: train in one call, load and generate in two."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.build import RUNS, base_path, check_fits
from softprompt.checkpoint import Adapter, load_adapter, newest_adapter
from softprompt.config import precision_faults, train_config
from softprompt.errors import AdapterError, ConfigError, DataError
from softprompt.fields import AUTO, is_text
from softprompt.generate import GenerationSettings, generate
from softprompt.infer_config import generation_faults
from softprompt.model import load_base, load_tokenizer, resolve_device, resolve_dtype, word_embeddings
from softprompt.recorder import Run
from softprompt.rows import question
from softprompt.run import run_training
from softprompt.template import Template

Question = str | Mapping[str, Any]


def train(preset: str | None = None, **settings: Any) -> Run:
    """What `python train.py` does, with its flags as keyword arguments: train(dataset="rows.jsonl", eval_rows=100).

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    return run_training(train_config(preset, **settings))


class SoftPromptModel:
    """A frozen base, a learned prompt (or none), and the template that the prompt was learned with."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        prompt: Tensor | None,
        template: Template | None = None,
        generation: Mapping[str, Any] | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        """prompt: [P, H] fp32, or None for the bare base; `generation` overrides the article's settings."""
        self.base, self.tokenizer, self.prompt = base, tokenizer, prompt
        self.template = template or Template()
        self.generation = dict(generation or {})
        self.compute_dtype = compute_dtype
        self.description = "base " + str(getattr(base, "name_or_path", ""))

    @classmethod
    def from_pretrained(
        cls,
        base: str | None = None,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        bf16: bool | None = None,
        fp16: bool | None = None,
    ) -> "SoftPromptModel":
        """Load a base and an adapter folder, ours or PEFT's. Without a base the adapter's own is taken; without an
        adapter the newest under runs/; "none" is the bare base (of the newest adapter, where no base is named).

        Raises:
            AdapterError: no such adapter, one that is broken, or one for a base of another hidden size.
            ModelError: the base cannot be loaded.
            ConfigError: a device or precision that is not there.
        """
        if faults := precision_faults(bf16, fp16, device):
            raise ConfigError("; ".join(faults))
        where = resolve_device(device)
        dtype = resolve_dtype(where, bf16, fp16)
        bare = adapter == "none"
        folder = None if bare and base else newest_adapter(RUNS) if adapter is None or bare else Path(adapter)
        loaded = load_adapter(folder) if folder else None
        name = base or (loaded.base_model_name_or_path if loaded else None)
        if name is None:
            raise AdapterError(f"adapter {folder}: names no base; give --model_name_or_path")
        path = base_path(name)
        tokenizer = load_tokenizer(path)
        model = load_base(path, where, dtype)
        if loaded and not bare:
            check_fits(folder or "", loaded.prompt, word_embeddings(model).embedding_dim, name)
        prompt, template, generation = _saved(loaded, bare)
        tuned = cls(model, tokenizer, prompt, template, generation, dtype)
        other = loaded.base_model_name_or_path if loaded else None
        if prompt is not None and other not in (None, name):
            print(f"warning: the adapter was trained on {other}, not on {name}", file=sys.stderr)
        tuned.description = f"base {name}, " + ("no prompt" if prompt is None else f"adapter {folder}")
        return tuned

    @overload
    def generate(self, prompts: str | Mapping[str, Any], **settings: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Question], **settings: Any) -> list[str]: ...
    def generate(self, prompts: Question | Sequence[Question], **settings: Any) -> str | list[str]:
        """Answer one question (→ str) or several (→ list); see `stream`."""
        if isinstance(prompts, str | Mapping):
            return next(self.stream([prompts], **settings))
        return list(self.stream(prompts, **settings))

    def stream(
        self, prompts: Sequence[Question], *, seed: int | None = None, batch_size: int = 8, **settings: Any
    ) -> Iterator[str]:
        """Answers one by one, after all questions have been checked. A question is a text, or a row with the template's
        columns.

        `settings` are GenerationSettings' fields, over those saved beside the adapter; None is as good as not given.
        `seed` makes samples repeatable; `batch_size` questions are answered together.

        Raises:
            ConfigError: an unknown or impossible setting, or a question that leaves no room for an answer.
            DataError: a row without the template's columns.
        """
        chosen = self.settings(**settings)
        if faults := generation_faults({"seed": seed, "batch_size": batch_size}):
            raise ConfigError("; ".join(faults))
        template = self.template
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, Mapping) and not is_text(prompt):
                raise DataError(f"question {number} is no text and no row: {prompt!r:.80}")
        if not prompts:
            return iter(())
        rows = [template.row(p) if isinstance(p, str) else question("question", dict(p), template) for p in prompts]
        special = self.template.spec != "chat"
        texts = [self.template.render(row, self.tokenizer) for row in rows]
        ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        for number, tokens in enumerate(ids, start=1):
            if not tokens:
                raise ConfigError(f"question {number} is empty: the template makes no token of it; write something")
        if seed is not None:
            torch.manual_seed(seed)
        answers = generate(self.base, self.tokenizer, self.prompt, ids, chosen, self.compute_dtype, batch_size)
        return (self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers)

    def settings(self, **given: Any) -> GenerationSettings:
        """What is given (not None), over what is saved beside the adapter, over the article's."""
        merged = {**self.generation, **{name: value for name, value in given.items() if value not in (None, AUTO)}}
        if given.get("max_length") is not None and given.get("max_new_tokens") is None:
            merged.pop("max_new_tokens", None)  # a limit that is asked for beats a saved one
        try:
            chosen = GenerationSettings(**merged)
        except TypeError:
            known = ", ".join(GenerationSettings.__dataclass_fields__)
            raise ConfigError(f"unknown among generation settings {', '.join(merged)}; they are {known}") from None
        if faults := generation_faults(merged):
            raise ConfigError("; ".join(faults))
        return chosen


def _saved(adapter: Adapter | None, bare: bool) -> tuple[Tensor | None, Template, Mapping[str, Any]]:
    if adapter is None:
        return None, Template(), {}
    generation = adapter.settings.get("generation", {})
    if not isinstance(generation, dict) or None in generation.values() or AUTO in generation.values():
        raise AdapterError(f"softprompt.json: generation must be an object of settings with values, not {generation!r}")
    return None if bare else adapter.prompt, Template(adapter.settings.get("template", "default")), generation
