"""Text as it streams: whole characters, stop strings wherever tokens cut them."""

from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.inference.text import TextStream, token_bytes


def stream_of(chunks, stop_strings=()):
    stream = TextStream(stop_strings)
    pieces = [stream.feed(chunk) for chunk in chunks]
    return [*pieces, stream.finish()], stream


def test_characters_come_whole():
    text = "né 世界 🙂!"
    pieces, stream = stream_of([bytes([byte]) for byte in text.encode()])
    assert [piece for piece in pieces if piece] == list(text) and stream.text == text
    assert stream_of(["é".encode()[:1]])[0] == ["", "\ufffd"]


def test_nothing_of_a_stop_string_is_ever_shown():
    pieces, stream = stream_of([b"a\n", b"\nObs", b"erv", b"ation:", b" x"], ["\n\nObservation:"])
    assert pieces == ["a", "", "", "", "", ""] and stream.stopped and stream.text == "a"


def test_what_only_began_like_a_stop_string_comes_later():
    pieces, stream = stream_of([b"a\n", b"\nObs", b"olete"], ["\n\nObservation:", "zz"])
    assert pieces == ["a", "", "\n\nObsolete", ""] and not stream.stopped
    assert stream_of([b"ab", b"a"], ["abab"])[0] == ["", "", "aba"]


def test_an_id_that_the_tokenizer_does_not_have_is_a_replacement_character(tmp_path):
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    tokenizer = Tokenizer(tmp_path / "bytes.tiktoken")
    assert token_bytes(tokenizer, 97) == b"a" and token_bytes(tokenizer, tokenizer.vision_tokens["<box>"]) == b"<box>"
    assert token_bytes(tokenizer, tokenizer.vision_vocab_size).decode() == "\ufffd"


@given(st.text("abé\n", max_size=30), st.lists(st.text("abé\n", min_size=1, max_size=4), max_size=3), st.data())
def test_however_it_is_cut_the_text_ends_before_the_first_stop_string(text, stop_strings, data):
    """Any cut into tokens gives the same text; of stop strings that end together, the one that begins first wins."""
    raw, chunks = text.encode(), []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        chunks.append(raw[:size])
        raw = raw[size:]
    pieces, stream = stream_of(chunks, stop_strings)
    assert "".join(pieces) == stream.text
    one_by_one, _ = stream_of([character.encode() for character in text], stop_strings)
    assert not any(stop in stream.text for stop in stop_strings)
    assert stream.stopped == any(stop in text for stop in stop_strings)
    assert text.startswith(stream.text)
    if not stream.stopped:
        assert stream.text == text == "".join(one_by_one)
    if len(stop_strings) == 1 and stream.stopped:
        assert stream.text == text[: text.index(stop_strings[0])] == "".join(one_by_one)
