"""A study's page and pictures: what stands in them for what the cells were."""

import json
from dataclasses import replace

import pytest

from softprompt.charts import pictures
from softprompt.points import Point
from softprompt.study_page import page, table_of

ONE = Point("b", 1000, "d", "RANDOM", 10, 3e-2, 100, 0, True, "", 1, 1.0, None, 4.0, None, 50, "", "{}")


def context(**settings):
    return json.dumps({"template": None, "eval_rows": 5, **settings})


def test_settings_that_vary_are_named():
    points = [replace(ONE, context=context(eval_rows=n), seed=s) for n in (5, 9) for s in (0, 1)]
    (head, _, five, nine) = table_of(points)
    at = head.index("other settings")
    assert (five[at], nine[at]) == ("eval_rows 5", "eval_rows 9")


def test_the_base_is_shown_on_the_rows_and_in_the_template_of_the_cells_below():
    points = [replace(ONE, context=context(eval_rows=n), base_loss=loss) for n, loss in ((5, 4.0), (9, 6.0))]
    lines = [line[-2] for line in table_of(points)[1:]]
    assert lines == ["4.0000", "1.0000", "6.0000", "1.0000"]


def test_texts_are_letters_in_a_table():
    text = "a|b\\|c <script>x</script> *d*\r\n`e`"
    points = [ONE, replace(ONE, init="TEXT", start=text)]
    lines = page((), table_of(points), [], []).decode().split("\n")
    (line,) = [line for line in lines if "TEXT" in line]
    assert r"| a\|b\\\|c \<script>x\</script> \*d\*\r\n\`e\` |" in line


@pytest.mark.filterwarnings("error")
def test_every_line_of_a_picture_is_there_under_its_name():
    texts = ("判断", "costs $5 and $6^{$", "_")
    points = [
        replace(ONE, init="TEXT", start=text, virtual_tokens=P, loss=loss)
        for text, loss in zip(texts, (1.0, 2.0, 3.0), strict=True)
        for P in (1, 10)
    ]
    drawn = (pictures(points) or {})["study-virtual_tokens.svg"].decode()
    assert drawn.count('id="LineCollection_') == 2 * len(texts)  # a spread and one in the legend
    assert all(f">{text}</text>" in drawn for text in texts)
