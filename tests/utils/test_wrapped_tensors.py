"""Tensors that wrap others: the memory they take is that of the wrapped tensors."""

import torch
from helpers.small_bases import small_base
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from softprompt.engines.activation_measure import measure_activations
from softprompt.engines.memory_estimate import resident_bytes
from softprompt.utils.wrapped_tensors import stored_parts


def test_the_parts_of_a_tensor_are_those_that_hold_its_data():
    a, b, c = torch.zeros(2), torch.ones(2), torch.ones(2)
    assert [id(part) for part in stored_parts(TwoTensor(TwoTensor(a, b), c))] == [id(a), id(b), id(c)]
    assert [id(part) for part in stored_parts(a)] == [id(a)]


def test_the_memory_of_a_base_with_such_weights():
    """Its 2 · 3 · 5 values count once, as part of the base, also where a layer saves them for the backward pass."""
    base = small_base("llama")
    resident, measured = resident_bytes(base), measure_activations(base, lambda x, P: x.cumsum(0).square())
    base.extra = nn.Parameter(TwoTensor(torch.zeros(3, 5), torch.zeros(3, 5)), requires_grad=False)
    assert resident_bytes(base) == resident + 2 * 3 * 5 * 4

    def with_product(x, P):
        torch.mul(torch.zeros(3, 5, requires_grad=True), base.extra)
        return x.cumsum(0).square()

    assert measure_activations(base, with_product) == measured
