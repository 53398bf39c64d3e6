"""Cached results of checks: what they hold for, and which are ignored."""

import math

import pytest
import torch
from helpers.small_bases import small_base

from softprompt.engines import check_cache
from softprompt.engines.check_cache import cache_result, cached_result, result_key
from softprompt.engines.self_check import CheckResult

FP32 = torch.float32


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_result_holds_for_one_kind_of_cpu(monkeypatch):
    base, cpu = small_base("llama"), torch.device("cpu")
    assert check_cache._cpu_name()
    here = result_key(base, cpu, FP32, 3)
    monkeypatch.setattr(check_cache, "_cpu_name", lambda: "another CPU")
    assert result_key(base, cpu, FP32, 3) != here


def test_a_result_does_not_outlive_a_change_of_the_code(monkeypatch):
    base = small_base("llama")
    keys = [result_key(base, torch.device("cpu"), FP32, 3) for _ in range(2)]
    for packages in (("engines",), ("generation",), ()):
        monkeypatch.setattr(check_cache, "CHECKED_PACKAGES", packages)
        check_cache._code_hash.cache_clear()
        keys.append(result_key(base, torch.device("cpu"), FP32, 3))
    check_cache._code_hash.cache_clear()
    assert keys[0] == keys[1] and len(set(keys)) == 4


@pytest.mark.parametrize(
    "wrong", [{"loss_error": math.nan}, {"speed": -1.0}, {"speed": math.inf}, {"failure": "boom"}, {"rows": None}]
)
def test_a_cached_result_that_is_none_is_ignored(wrong):
    good = CheckResult(4, 9, 1e-6, 1e-6, 0.0, 2.0)
    cache_result("key", good)
    assert cached_result("key", 9) == good and cached_result("key", 10) is None
    cache_result("key", good._replace(**wrong))
    assert cached_result("key", 9) is None
