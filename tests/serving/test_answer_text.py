"""The text of an answer, token by token."""

import random

from hypothesis import given
from hypothesis import strategies as st

from softprompt.models.loading import base_path, load_tokenizer
from softprompt.serving.answer_text import REPLACEMENT, Detokenizer, StopStrings, Strip

TOKENIZER = load_tokenizer(base_path("mini"))


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40), st.integers(0, 3))
def test_pieces_of_any_tokens_join_to_their_text(ids, context):
    """Random tokens of a vocabulary of bytes hold many that are no characters. What is shown is never taken back."""
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet="好a🙂é \n", max_size=30), st.randoms())
def test_no_character_is_cut_in_two(text, draw: random.Random):
    """Each byte is a token of its own."""
    table = {TOKENIZER.convert_ids_to_tokens(i): i for i in range(len(TOKENIZER))}
    byte_level = TOKENIZER.backend_tokenizer.pre_tokenizer
    names = [c for word, _ in byte_level.pre_tokenize_str(text) for c in word]
    ids = [table[name] for name in names if name in table]
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


SHORT = st.text(alphabet="ab", max_size=3)


@given(st.lists(SHORT, max_size=12), st.lists(SHORT.filter(bool), min_size=1, max_size=4))
def test_a_stop_string_is_found_across_pieces(pieces, stops):
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        if finder.found:
            break
        shown += finder.add(piece)
        assert not any(stop in shown for stop in stops)
    text = "".join(pieces)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert finder.found == bool(ends)
    if not ends:
        assert shown + finder.finish() == text
    else:
        assert text.startswith(shown) and any(text.startswith(shown + stop) for stop in stops)


@given(st.lists(st.text(alphabet=" \na好", max_size=3), max_size=12))
def test_white_space_is_omitted_at_both_ends(pieces):
    strip = Strip(True)
    assert "".join(map(strip.add, pieces)) == "".join(pieces).strip()
    assert "".join(map(Strip(False).add, pieces)) == "".join(pieces)
