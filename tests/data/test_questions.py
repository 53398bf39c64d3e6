"""Questions of a distillation as token ids."""

import random

import pytest

from softprompt.data.questions import BehindPrefix


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_stored_behind_what_all_of_them_share(seed):
    """At least one id of each row is kept, also if a row is the beginning of another one."""
    draw = random.Random(seed)
    ends = [draw.choices(range(3), k=draw.randint(1, 3)) for _ in range(draw.randint(1, 6))]
    rows = [[*range(draw.randint(0, 5)), *end] for end in ends]
    behind = BehindPrefix()
    for row in rows:
        behind.append(row)
    shared = max(n for n in range(min(map(len, rows))) if all(row[:n] == rows[0][:n] for row in rows))
    assert behind.prefix == rows[0][:shared] and behind.rows == [row[shared:] for row in rows]
