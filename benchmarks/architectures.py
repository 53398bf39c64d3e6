#!/usr/bin/env python3
"""Find the causal language models of transformers for which the packed engine is exact.

    python benchmarks/architectures.py [TYPE …]

This script builds a tiny random model of each type that the installed transformers has (or of each given type). It
checks the packed engine against the padded engine in fp32, on rows that are longer than the sliding windows and
attention chunks. It prints one line per type with the result and the reason, then a Markdown table of the types by
result, and below it the reasons with the types that have them. The results are:

packed      the packed engine is exact
padded      the packed engine is not exact or cannot be built; the padded one runs
refused     no prompt can be trained for models of this type
fails       the check itself fails: the model raises an error, which may be due to its small sizes
not built   the script cannot build a small model
"""

import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from arguments import ArgumentParser
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from softprompt.data.examples import Example
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.self_check import compare
from softprompt.models.capabilities import build_on_meta_device, check_supports_prompt
from softprompt.models.loading import check_config, freeze, word_embeddings
from softprompt.utils.errors import ModelError

WINDOW, SECONDS, FP32 = 8, 60, torch.float32
SHOWN = 160  # characters of a reason in the line of its type
# Sizes under the names that configurations use; each configuration gets those that it has.
SIZES: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": WINDOW},
    **{"attention_chunk_size": WINDOW, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    **{
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "d_model": 32, "n_layers": 2, "n_heads": 4},
    **{"ffn_dim": 64, "word_embed_proj_dim": 32, "rotary_dim": 4, "window_size": WINDOW, "ffn_hidden_size": 64},
    **{"attention_hidden_size": 32, "hidden_act": "silu", "state_size": 4, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "first_k_dense_replace": 1},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    **{"mamba_d_ssm": 64, "attention_types": [[["global", "local"], 1]], "d_head": 8, "d_inner": 64},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "global_head_dim": 8},
}
# Sizes for particular types, which replace those above; None removes a size.
OF_TYPES: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "xlnet": {"max_position_embeddings": None},
    "zaya": {"num_experts_per_tok": 1},
}

KINDS = ("packed", "padded", "refused", "fails", "not built")


class Result(NamedTuple):
    """The result for one type: its kind, which is one of KINDS, and the reason."""

    kind: str
    reason: str


def main() -> None:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types, such as llama (default: all)")
    types = parser.parse_args().types or sorted(
        name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for name in types:
        results[name] = examined(name)
        print(f"{name:28} {results[name].kind:10} {results[name].reason[:SHOWN]}", flush=True)
    print_table(results)


def examined(name: str) -> Result:
    """Build a tiny model of the type `name` and check it."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        config = tiny_config(name)
        check_config(config, name)
        base = tiny(config)
    except ModelError as error:
        return Result("refused", one_line(error))
    except Exception as error:
        return _refused_by_its_modules(name) or Result("not built", one_line(error))
    finally:
        signal.alarm(0)
    try:
        return checked(base, name)
    except ModelError as error:
        # If an error of the model stands behind it, the model was not compared.
        return Result("fails" if error.__context__ else "refused", one_line(error))
    except Exception as error:
        return Result("fails", one_line(error))


def _refused_by_its_modules(name: str) -> Result | None:
    """Build a model of this type in its default size on the meta device. Return why no prompt can be trained for it;
    None if no reason is found."""
    try:
        signal.alarm(SECONDS)
        base = build_on_meta_device(CONFIG_MAPPING[name](), name)
    except Exception:
        return None
    try:
        check_supports_prompt(base, name)
    except ModelError as error:
        return Result("refused", one_line(error))
    return None


def tiny_config(name: str) -> Any:
    """Return a configuration with small layers: one of each kind in its default `layer_types`, else two."""
    config = CONFIG_MAPPING[name]()
    check_config(config, name)
    text = config.get_text_config(decoder=True)
    sizes = {**SIZES, **OF_TYPES.get(name, {})}
    known = {size: value for size, value in sizes.items() if value is not None and _can_be_set(text, size)}
    if "qk_rope_head_dim" in known:  # multi-head latent attention: as many key-value heads as heads
        known |= {"head_dim": 8, "num_key_value_heads": 4}
    if types := known.get("layer_types") or getattr(text, "layer_types", None):
        known["layer_types"] = [*dict.fromkeys(types)][: len(set(types))] if len(set(types)) > 1 else [types[0]] * 2
        known |= {size: len(known["layer_types"]) for size in ("num_hidden_layers", "n_layer") if size in known}
        if not _can_be_set(text, "layer_types"):
            del known["layer_types"]
    if text is config:
        return type(config)(**known)
    part = next(key for key, value in vars(config).items() if value is text)
    return type(config)(**{part: {**text.to_dict(), **known}})


def _can_be_set(config: Any, name: str) -> bool:
    """Whether the configuration has the attribute `name`, and it is not a read-only property."""
    declared = getattr(type(config), config.attribute_map.get(name, name), None)
    try:
        return hasattr(config, name) and not (isinstance(declared, property) and declared.fset is None)
    except Exception:
        return False


def tiny(config: Any) -> PreTrainedModel:
    """Return a random model. Noise on all parameters makes those matter that are initialized with 0 or 1."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_((0.2 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter))
    return freeze(base, FP32)


def checked(base: PreTrainedModel, name: str) -> Result:
    """Compare the packed engine with the padded engine on random rows behind a random prompt.

    Raises:
        ModelError: No prompt can be trained for the base, or it cannot be run on embeddings.
    """
    check_supports_prompt(base, name)
    draw = torch.Generator().manual_seed(0)
    V, H = word_embeddings(base).weight.shape
    rows = []
    for length in (3 * WINDOW, 2 * WINDOW + 1, 5, 2):
        ids = torch.randint(4, min(V, 290), (length,), generator=draw).tolist()
        rows.append(Example(ids, [-100] * (length // 2) + ids[length // 2 :]))
    padded = padded_engine(base, SimpleNamespace(pad_token_id=0), FP32, 10_000)
    try:
        packed = packed_engine(base, FP32, 10_000)
    except ModelError as error:
        return Result("padded", one_line(error))
    result = compare(packed, padded, torch.randn(5, H, generator=draw), rows)
    if result.is_right(FP32):
        return Result("packed", f"gradient off by {result.gradient_error:.0e}")
    return Result("padded", result.failure or f"the gradient differs by {result.gradient_error:.0e}")


def print_table(results: dict[str, Result]) -> None:
    counts = Counter(result.kind for result in results.values())
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {dict(counts)}\n")
    print("| engine | model types |\n|---|---|")
    for kind in KINDS:
        names = [name for name, result in results.items() if result.kind == kind]
        print(f"| {kind} ({len(names)}) | {', '.join(names)} |")
    for kind in KINDS[1:]:
        for reason, names in by_reason(results, kind).items():
            print(f"\n{kind}, {reason} ({len(names)}): {', '.join(names)}")


def by_reason(results: dict[str, Result], kind: str) -> dict[str, list[str]]:
    """Return the types of a kind by their reason, the commonest first. Numbers and names of types and classes in it are
    replaced, so that equal reasons are found."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.kind == kind:
            reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "TYPE", result.reason)
            reason = re.sub(r"\b[A-Z]\w*[a-z]\w*[A-Z]\w*\b", "CLASS", reason)
            reason = re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "N", reason.removeprefix("TYPE: ").removeprefix(": "))
            found.setdefault(reason, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def _too_long(*_: object) -> None:
    raise TimeoutError(f"takes more than {SECONDS} s to build")


if __name__ == "__main__":
    main()
