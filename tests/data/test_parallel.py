"""Worker processes change nothing but the time that tokenizing takes."""

import os
import signal

import pytest
from helpers.bases import make_tokenizer

from softprompt.config.loader import train_config
from softprompt.data import tokenization
from softprompt.data.parallel import map_in_processes
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.utils.errors import ConfigError, DataError

ROWS = [{"instruction": f"第{i}题" * (i % 7), "input": "", "output": "好" * (i % 3)} for i in range(1, 100)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenization, "CHUNK", 8)


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_result_does_not_depend_on_the_number_of_workers(side):
    one, two, three = (tokenize(ROWS, make_tokenizer(), Template(), 30, side, workers=n) for n in (None, 2, 3))
    for other in (two, three):
        assert list(other.examples) == list(one.examples)
        assert (other.kept, other.missing) == (one.kept, one.missing) and str(other) == str(one)
        assert other.rows == len(ROWS) and other.cut == one.cut > 0
    assert one.without_target > 0 or side == "input"


def test_a_refused_row_is_the_first_one_and_no_worker_stays():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if '5' in messages[0].content %}{{ raise_exception('no') }}{% endif %}a"
    for workers in (None, 2):
        with pytest.raises(DataError, match=r"row 5: the tokenizer's chat template refuses a row: no"):
            tokenize(ROWS, tokenizer, Template("chat"), 99, workers=workers)


def test_no_row_keeps_a_target():
    with pytest.raises(DataError, match="no row keeps a target at --max_length 3"):
        tokenize(ROWS, make_tokenizer(), Template(), 3, workers=2)


def add(common, item):
    return common + item


def die(common, item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    results = map_in_processes(add, 100, items(), 2)
    assert next(results) == 100 and len(taken) < 20
    assert list(results) == list(range(101, 150))


def test_a_killed_worker_ends_the_run_with_one_line():
    with pytest.raises(DataError, match="--preprocessing_num_workers 2: a worker process was killed"):
        list(map_in_processes(die, None, range(3), 2))


def test_the_environment_stays_as_it_was(monkeypatch):
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        list(map_in_processes(add, 1, [1, 2], 2))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_the_flag():
    assert train_config("mini").data.preprocessing_num_workers is None
    assert train_config("mini", preprocessing_num_workers=2).data.preprocessing_num_workers == 2
    with pytest.raises(ConfigError, match="--preprocessing_num_workers 0"):
        train_config("mini", preprocessing_num_workers=0)
