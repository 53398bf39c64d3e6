"""Tiny bases, tokenizers and adapters that are made on the spot."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.utils.atomic_io import write_folder

TEXTS = [
    "Human: 我爱这部电影\n\nAssistant: 正面",
    "Human: 这家酒店太差了\n\nAssistant: 负面",
    "Human: hello\n\nAssistant: ok",
]


BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # BLOOM's pre-tokenizer


def make_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level BPE with BLOOM's special tokens; it knows every byte and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = dict(zip(["unk_token", "bos_token", "eos_token", "pad_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **names)


def make_bloom(
    hidden_size: int = 32, n_layer: int = 2, n_head: int = 4, vocab_size: int = 300, seed: int = 0, **config: Any
) -> BloomForCausalLM:
    """A random BLOOM whose every weight matters: layer norms and biases are not left at ones and zeros."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden_size, "n_layer": n_layer, "n_head": n_head, "vocab_size": vocab_size}
    model = BloomForCausalLM(BloomConfig(**sizes, **{"initializer_range": 0.3, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "word_embeddings" in name:
                parameter.mul_(2)
    return model


def write_adapter(folder: Path, base: Path, P: int, template: str = "default", seed: int = 0, size: int = 32) -> None:
    values = torch.randn(P, size, generator=torch.Generator().manual_seed(seed))
    config = peft_config(str(base), make_bloom(hidden_size=size).config, values, "RANDOM")
    write_folder(folder, adapter_files(Adapter(values, config, {"template": template})))
