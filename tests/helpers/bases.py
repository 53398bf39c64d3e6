"""Random BLOOM models and a tokenizer, made on the spot."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

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


def write_deep_bloom(folder: Path, H: int = 1024, L: int = 15, N: int = 16, dtype: torch.dtype = torch.float32) -> None:
    """Write a BLOOM of many layers and a small vocabulary, one file a layer. All layers have the same weights, so that
    only one is drawn."""
    one = make_bloom(H, 1, N, initializer_range=0.02).to(dtype)
    block = {n: t for n, t in one.state_dict().items() if n != "lm_head.weight"}
    BloomConfig(hidden_size=H, n_layer=L, n_head=N, vocab_size=300, dtype=dtype).save_pretrained(folder)
    names = {}
    for i in range(L):
        renamed = {n.replace(".h.0.", f".h.{i}."): t for n, t in block.items() if ".h.0." in n or i == 0}
        save_file(renamed, folder / f"model-{i}.safetensors")
        names |= dict.fromkeys(renamed, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
