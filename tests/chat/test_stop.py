import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.chat.stop import StopFilter


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """What is shown of the pieces, and whether a stop string ended them."""
    stop_filter = StopFilter(stops)
    shown = ""
    for piece in pieces:
        shown += stop_filter.feed(piece)
        if stop_filter.stopped:
            return shown, True
    return shown + stop_filter.flush(), False


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The specification: cut before the stop string that is complete first, the longest of these."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - len(max(ending, key=len))], True
    return text, False


@pytest.mark.parametrize(
    "text, stops, shown",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one two three", [], "one two three"),
        ("one two three", ["e"], "on"),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("abababac", ["ababac"], "ab"),
        ("abcd", ["bc", "abcd"], "a"),
        ("xabc", ["bc", "abc"], "x"),
        ("STOP", ["STOP"], ""),
        ("almost STO", ["STOP"], "almost STO"),
        ("naïve 😀 end", ["😀"], "naïve "),
        ("line\n\nline", ["\n\n"], "line"),
    ],
)
def test_text_is_cut_before_the_first_stop_string_at_every_border(text: str, stops: list[str], shown: str) -> None:
    stopped = shown != text
    for border in range(len(text) + 1):
        assert run([text[:border], text[border:]], stops) == (shown, stopped)
    assert run(list(text), stops) == (shown, stopped)


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == first_stop("".join(pieces), stops)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=12), stop=st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_begin_a_stop_string(pieces: list[str], stop: str) -> None:
    stop_filter = StopFilter([stop])
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += stop_filter.feed(piece)
        if stop_filter.stopped:
            return
        assert text.startswith(shown)
        assert stop.startswith(text[len(shown) :])


def test_a_long_stop_string_costs_no_search_at_each_character() -> None:
    num_characters = 20_000
    stop_filter = StopFilter(["a" * 4096 + "b"] * 2)
    assert stop_filter.feed("a" * num_characters) == "a" * (num_characters - 4096)
    assert stop_filter.flush() == "a" * 4096
