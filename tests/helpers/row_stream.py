"""Shared by several test modules."""

import random


def naive_order(rows, size, seed, epoch):
    """A buffer of `size` rows; a further row comes in where a random one goes out; then the rest at random."""
    draw, buffer, out = random.Random(f"{seed} {epoch}"), [], []
    for row in rows:
        if len(buffer) == size:
            out.append(buffer[at := int(draw.random() * size)])
            buffer[at] = row
        else:
            buffer.append(row)
    while buffer:
        at = int(draw.random() * len(buffer))
        out.append(buffer[at])
        buffer[at] = buffer[-1]
        buffer.pop()
    return out
