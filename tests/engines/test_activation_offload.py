"""Activations that are written to a file and read back."""

import os

import pytest
import torch

from softprompt.engines.activation_offload import ActivationStore
from softprompt.utils.errors import TrainingError


def short(descriptor, views, offset):
    return 0


def broken(descriptor, views, offset):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("read, told", [(short, "shorter"), (broken, "Input/output error")])
def test_activations_that_cannot_be_read_back(read, told, tmp_path, monkeypatch):
    with ActivationStore(0, tmp_path) as store:
        store.put("a", torch.arange(6.0))
        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(TrainingError, match=rf"--offload_folder {tmp_path}: .*{told}"):
            store.pop("a")


def test_activations_that_come_back_in_parts(tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: real(descriptor, [views[0][:5]], at))
    with ActivationStore(0, tmp_path) as store:
        store.put("a", torch.arange(6.0))
        assert torch.equal(store.pop("a"), torch.arange(6.0))
