"""benchmarks/architectures.py: what it finds about a type of model, and why."""

import sys
from pathlib import Path

import pytest
from transformers.models.llama.modeling_llama import LlamaModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def architectures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import architectures

        yield architectures
    sys.modules.pop("architectures")


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("llama", "packed", "gradient off by"),
        ("mpt", "padded", "attention interface"),
        ("bert", "refused", "encoder"),
        ("cpmant", "refused", "takes no inputs_embeds"),
        ("gemma4", "refused", "per-layer inputs"),  # its small configuration cannot be built
    ],
)
def test_what_is_found_about_a_type(name, kind, reason, architectures):
    found = architectures.examined(name)
    assert found.kind == kind and reason in found.reason and found.reason


def test_a_check_that_fails_does_not_count_as_a_refusal(architectures, monkeypatch):
    def fails(*args, **others):
        raise ValueError("an odd size")

    monkeypatch.setattr(architectures, "compare", fails)
    assert architectures.examined("llama") == architectures.Result("fails", "an odd size")
    monkeypatch.setattr(LlamaModel, "forward", fails)  # the first pass of the check, before anything is compared
    found = architectures.examined("llama")
    assert found.kind == "fails" and "cannot be run on embeddings: an odd size" in found.reason


def test_reasons_are_grouped(architectures, capsys):
    told = {
        "bert": ("refused", "bert: a model of type bert is an encoder"),
        "electra": ("refused", "electra: a model of type electra is an encoder"),
        "cpmant": ("refused", "cpmant: CpmAntForCausalLM takes no inputs_embeds"),
        "falcon": ("padded", "the gradient differs by 2e-01"),
        "jamba": ("padded", "the gradient differs by 7.5e-03"),
        "llama": ("packed", "gradient off by 1e-06"),
    }
    results = {name: architectures.Result(*one) for name, one in told.items()}
    groups = {kind: list(architectures.by_reason(results, kind).values()) for kind in architectures.KINDS}
    assert groups["refused"] == [["bert", "electra"], ["cpmant"]] and groups["padded"] == [["falcon", "jamba"]]
    assert groups["fails"] == []
    architectures.print_table(results)
    shown = capsys.readouterr().out
    assert "| refused (3) | bert, electra, cpmant |" in shown and "| fails (0) |" in shown
    assert "encoder (2): bert, electra" in shown
