"""Generate rows of an English task whose answers follow from a rule: an order is rewritten as a polite request.

    Close the old window.                 → Could you please close the old window?
    Do not sell the small radio today.    → Could you please not sell the small radio today?

The held-out rows are the last ones of the file (`--eval_rows` of train.py takes them). No verb and object of theirs
occur together in a training row, so a prompt cannot know their answers by heart.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from arguments import ArgumentParser, seed

Row = dict[str, str]
Pair = tuple[str, str]  # a verb and an object
# Verbs, adjectives and objects that go together.
THINGS = (
    (
        "open close lock paint repair measure",
        "old small heavy broken front wooden",
        "window door gate drawer cabinet suitcase trunk locker",
    ),
    (
        "clean wash dry wipe polish inspect",
        "dirty large round white old blue",
        "table floor mirror bathtub plate bottle bucket shelf",
    ),
    (
        "read print copy sign send file",
        "long new short final first urgent",
        "letter report contract form invoice article list message",
    ),
    (
        "carry move lift bring hide find",
        "heavy small red empty square spare",
        "box chair bag ladder basket lamp crate blanket",
    ),
    (
        "heat serve taste cover order share",
        "hot fresh spicy leftover sweet small",
        "soup rice stew pie pasta curry salad cake",
    ),
    (
        "test check sell buy clean repair",
        "used new green expensive small spare",
        "bicycle engine radio camera phone printer clock guitar",
    ),
)
ADVERBIALS = ("", "carefully", "quickly", "now", "today", "tomorrow", "tonight", "before lunch", "after the meeting")
HELD_OUT_SHARE = 0.15  # of the pairs of a verb and an object


def rewriting_rows(rows: int, held_out: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return `rows` training rows and `held_out` held-out rows, all of them different. The same seed gives the same
    rows. No pair of a verb and an object is in both lists.

    Raises:
        ValueError: There are not as many different rows.
    """
    chance = random.Random(seed)
    pairs = sorted({(verb, thing) for verbs, _, things in THINGS for verb in verbs.split() for thing in things.split()})
    chance.shuffle(pairs)
    first = round(HELD_OUT_SHARE * len(pairs))
    found = []
    for wanted, of_pairs in ((rows, pairs[first:]), (held_out, pairs[:first])):
        every = list(_orders(set(of_pairs)))
        if wanted > len(every):
            raise ValueError(f"{wanted:,} rows were asked for, but there are only {len(every):,} different ones")
        found.append([{"instruction": order, "output": polite(order)} for order in chance.sample(every, wanted)])
    return found[0], found[1]


def polite(order: str) -> str:
    """Rewrite an order as a polite request."""
    words = order.removesuffix(".").replace("Do not ", "not ")
    return f"Could you please {words[0].lower()}{words[1:]}?"


def follows_rule(row: Mapping[str, str]) -> bool:
    """Return whether the row's output is the polite request for its instruction. The order is derived from the request,
    so that a mistake in `polite` would be found."""
    request = re.fullmatch(r"Could you please (not )?([a-z]+ the [a-z ]*[a-z])\?", row["output"])
    if not request:
        return False
    negation, action = request.groups()
    order = f"Do not {action}." if negation else f"{action.capitalize()}."
    return row["instruction"] == order


def verb_and_object(row: Mapping[str, str]) -> Pair:
    """Return the verb and the object of a row's order."""
    verb, _, _, thing = re.sub("^Do not ", "", row["instruction"]).rstrip(".").lower().split()[:4]
    return verb, thing


def _orders(pairs: set[Pair]) -> Iterator[str]:
    """Yield all orders with these verbs and objects, in an order that does not depend on the set's."""
    for verbs, adjectives, things in THINGS:
        for verb, adjective, thing in itertools.product(verbs.split(), adjectives.split(), things.split()):
            if (verb, thing) in pairs:
                for adverbial in ADVERBIALS:
                    action = " ".join(filter(None, (verb, "the", adjective, thing, adverbial)))
                    yield f"{action.capitalize()}."
                    yield f"Do not {action}."


def main() -> None:
    """Write the rows that the command line asks for."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("file", type=Path, metavar="ROWS.jsonl", help="write the rows into this file")
    parser.add_argument("--rows", type=int, default=6000, help="number of training rows (default: %(default)s)")
    parser.add_argument("--eval_rows", type=int, default=200, help="number of held-out rows (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice of rows (default: %(default)s)")
    args = parser.parse_args()
    try:
        train, held_out = rewriting_rows(args.rows, args.eval_rows, args.seed)
    except ValueError as error:
        parser.error(str(error))
    try:
        args.file.write_text("".join(json.dumps(row) + "\n" for row in [*train, *held_out]), encoding="utf-8")
    except OSError as error:
        parser.error(f"{args.file}: {error.strerror}")
    print(f"{len(train):,} training rows, then {len(held_out):,} held-out rows → {args.file}")


if __name__ == "__main__":
    main()
