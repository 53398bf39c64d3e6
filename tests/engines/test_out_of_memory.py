"""When memory runs out on the CPU or on a GPU, a window is computed again in smaller micro-batches, with the same
result."""

import pytest
import torch
from helpers.bases import make_bloom
from helpers.packed_cases import relative
from helpers.peers import gradient_of, random_examples
from helpers.small_bases import small_base

from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.models.loading import freeze
from softprompt.utils.errors import OutOfMemoryError

FP32, P, MOST = torch.float32, 3, 40
ERRORS = {
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory (as a test has it)"),
}


def limit_memory(layer, error, phase):
    """Let `layer` run out of memory in a pass over more than `most[0]` positions; return `most`."""
    most = [MOST]

    def refuse(*args):
        raise error

    def after_forward(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.shape[0] * output.shape[1] > most[0]:
            if phase == "forward":
                raise error
            if output.requires_grad:
                output.register_hook(refuse)

    layer.register_forward_hook(after_forward)
    return most


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("device", ERRORS)
@pytest.mark.parametrize(("engine", "kind"), [("packed", "llama"), ("padded", "llama"), ("padded", "bloom")])
def test_a_window_is_computed_again_in_smaller_micro_batches(engine, kind, device, phase, tokenizer, capsys):
    base = freeze(make_bloom() if kind == "bloom" else small_base(kind), FP32)
    rows, start = random_examples(12, 15, seed=2), torch.randn(P, 32, generator=torch.Generator().manual_seed(0))

    def engine_of(tokens):
        return packed_engine(base, FP32, tokens) if engine == "packed" else padded_engine(base, tokenizer, FP32, tokens)

    mean, gradient = gradient_of(engine_of(1000), start, rows)
    alone = engine_of(1000).row_losses(start, rows)
    layer = base.transformer.h[1] if kind == "bloom" else base.model.layers[1]
    most, limited = limit_memory(layer, ERRORS[device], phase), engine_of(4 * MOST)
    loss, same = gradient_of(limited, start, rows)
    assert loss == pytest.approx(mean, rel=1e-6) and relative(same, gradient) < 1e-5
    assert limited.tokens_per_microbatch == MOST
    assert capsys.readouterr().err.count("out of memory") == 2
    assert engine_of(4 * MOST).row_losses(start, rows) == pytest.approx(alone, rel=1e-5)
    most[0] = 0
    with pytest.raises(OutOfMemoryError, match=r"one row of \d+ tokens .* a smaller --max_length"):
        gradient_of(limited, start, rows)


def test_another_error_is_not_repeated(tokenizer):
    base = freeze(small_base("llama"), FP32)
    limit_memory(base.model.layers[1], RuntimeError("shapes differ"), "forward")
    with pytest.raises(RuntimeError, match="shapes differ"):
        gradient_of(padded_engine(base, tokenizer, FP32, 200), torch.randn(P, 32), random_examples(12, 15))
