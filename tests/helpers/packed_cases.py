"""Hypothesis strategies of rows and BLOOM bases, and measures, for tests of the packed engine's loss and gradient."""

import torch
from helpers.bases import make_bloom
from hypothesis import strategies as st

from softprompt.data.tokenization import Example, count_targets

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def ours(engine, values, rows):
    """Mean loss over all targets, and the gradient [P, H] of a prompt with `values` [P, H] in the prompt's dtype."""
    prompt, targets = values.detach().clone().requires_grad_(), sum(map(count_targets, rows))
    total, count = engine.accumulate(lambda: prompt, rows, 1 / max(1, targets))
    assert count == targets
    return total.item() / max(1, targets), prompt.grad


def relative(a, b):
    """‖a - b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


def prompt_like(base, P, seed=0):
    """A random prompt [P, H] in the base's dtype."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(P, base.config.hidden_size, generator=draw, dtype=torch.float64).to(base.dtype)


def labeled(ids, keep):
    """An example whose targets are the tokens that `keep` (booleans) marks."""
    return Example(ids, [token if kept else -100 for token, kept in zip(ids, keep, strict=True)])


# Rows with targets anywhere, including the first token, and rows without any; one row at least has a target.
ROWS = st.lists(
    st.integers(1, 15).flatmap(
        lambda n: st.builds(
            labeled,
            st.lists(st.integers(4, 59), min_size=n, max_size=n),
            st.one_of(st.just([False] * n), st.lists(st.booleans(), min_size=n, max_size=n)),
        )
    ),
    min_size=1,
    max_size=7,
).filter(lambda rows: any(map(count_targets, rows)))


def base_of(n_head: int, size: int, **rest):
    """A BLOOM with weights of variance 2/H. Much larger weights make attention so sharp that one rounding error can
    change a row's result."""
    hidden = n_head * size
    sizes = {"n_head": n_head, "hidden_size": hidden, "initializer_range": (2 / hidden) ** 0.5, "vocab_size": 60}
    return make_bloom(**{**sizes, **rest})


BASES = st.builds(
    base_of,
    n_head=st.integers(1, 7),
    size=st.sampled_from([8, 10, 12]),
    n_layer=st.integers(1, 3),
    seed=st.integers(0, 9),
    tie_word_embeddings=st.booleans(),
    apply_residual_connection_post_layernorm=st.booleans(),
)
