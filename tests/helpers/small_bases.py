"""Tiny random bases of several architectures, every one of whose weights matters."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from softprompt.models.loading import use_soft_caps

WINDOW = 8  # of those with a sliding window
SIZES: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},  # ALiBi by places
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},  # learned positions
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": WINDOW, "num_local_experts": 2},
    "qwen2_full": {},
    "qwen3": {"head_dim": 8},
    "phi3": {"sliding_window": WINDOW},
    "gpt_neox": {},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "stablelm": {},
    "modernbert-decoder": {
        "local_attention": 2 * WINDOW,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },  # dense layer before the head
    "qwen2_moe": {  # applies its window in the masks alone
        **{"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 30},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"shared_expert_intermediate_size": 32},
    },
    "llama_dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
}

# For tests whose fixtures take the base of `base_folder` (tests/conftest.py), which is a BLOOM by default.
ON_DECODERS = pytest.mark.parametrize("base_folder", ["bloom", "llama", "gemma3_text"], indirect=True)


def small_base(kind: str, seed: int = 0, **others: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    others |= {"max_position_embeddings": others["n_positions"]} if "n_positions" in others else {}  # the same of GPT-2
    config = CONFIG_MAPPING[kind.removesuffix("_full").removesuffix("_dynamic")](**{**SIZES, **KINDS[kind], **others})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    use_soft_caps(model)  # as `freeze` does: references are computed before it is frozen
    return model.float().requires_grad_(False)
