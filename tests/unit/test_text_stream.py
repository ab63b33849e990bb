"""Incremental decoding and stop strings against decoding everything and looking for the first."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import LLAMA3_SPECIALS, SENTENCE_SPECIALS, byte_fallback, byte_level

from duetjax.text.stream import TextDelta, TextStream
from duetjax.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_level().to_str().encode())
FALLBACK = Tokenizer(byte_fallback().to_str().encode())
METASPACE = Tokenizer(byte_fallback(prepend=False).to_str().encode())
NAMES = ["byte-level", "byte-fallback", "metaspace"]
EVERY_TOKENIZER = pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK, METASPACE], ids=NAMES)

# Byte-level vocabularies begin with printable bytes, then the others.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ORDER = [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]


def with_token(text):
    backend = byte_level()
    backend.add_tokens([text])
    return Tokenizer(backend.to_str().encode())


LONG_TOKEN = with_token("xabcd")


def byte_tokens(data):
    return [len(LLAMA3_SPECIALS) + ORDER.index(b) for b in data]


def fallback_tokens(data):
    return [len(SENTENCE_SPECIALS) + b for b in data]


def words(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def first_stop(text, stop, include):
    """The naive oracle: reads character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end if include else end - len(max(found, key=len))]
    return text


def run(tokenizer, pushes, stop=(), include=False):
    stream = TextStream(tokenizer, tuple(stop), include)
    deltas = [stream.push(ids).text for ids in pushes]
    return [*deltas, stream.finish()]


def text_of(tokenizer, ids, stop=(), include=False):
    return "".join(run(tokenizer, [[i] for i in ids], stop, include))


def cut(draw, ids):
    """The ids in pushes of random lengths, empty ones included."""
    bounds = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in itertools.pairwise([0, *bounds, len(ids)])]


STOPS = st.lists(
    st.one_of(st.text("ab \ufffdé你", min_size=1, max_size=4), st.sampled_from(["hello", "😀b"])),
    max_size=4,
)


@st.composite
def byte_level_cases(draw):
    """Whole words, special tokens, and bytes that are now and then characters."""
    piece = st.one_of(
        st.sampled_from([[i] for i in range(len(LLAMA3_SPECIALS))]),
        st.sampled_from(["hello", " the", "a", "b", " ", "é", "你", "😀"]).map(
            lambda t: words(BYTES, t)
        ),
        st.sampled_from([b"\xe4", b"\xbd", b"\xa0", b"\xff", b"\xf0\x9f", b"\xef\xbf\xbd"]).map(
            byte_tokens
        ),
        st.integers(0, BYTES.vocab_size + 1).map(lambda i: [i]),
    )
    ids = [i for part in draw(st.lists(piece, max_size=25)) for i in part]
    return cut(draw, ids), draw(STOPS), draw(st.booleans())


@settings(deadline=None, max_examples=200)
@given(byte_level_cases())
def test_deltas_are_the_decoded_text_up_to_the_first_stop_string(case):
    pushes, stop, include = case
    whole = BYTES.decode(list(itertools.chain(*pushes)))
    assert "".join(run(BYTES, pushes, stop, include)) == first_stop(whole, stop, include)


@st.composite
def sentence_cases(draw):
    """Words and characters in byte tokens, each character complete.

    Not U+FFFD itself: three of its byte tokens look like an invalid run until the run ends.
    """
    tokenizer = draw(st.sampled_from([FALLBACK, METASPACE]))
    piece = st.one_of(
        st.integers(261, tokenizer.vocab_size + 1).map(lambda i: [i]),
        st.integers(0, 4).map(lambda i: [i]),
        st.sampled_from(["é", "你", "😀", "a"]).map(lambda t: fallback_tokens(t.encode())),
    )
    ids = [i for part in draw(st.lists(piece, max_size=25)) for i in part]
    return tokenizer, cut(draw, ids), draw(STOPS), draw(st.booleans())


@settings(deadline=None, max_examples=200)
@given(sentence_cases())
def test_words_and_byte_tokens_stream_as_they_decode_at_once(case):
    tokenizer, pushes, stop, include = case
    whole = tokenizer.decode(list(itertools.chain(*pushes)))
    assert "".join(run(tokenizer, pushes, stop, include)) == first_stop(whole, stop, include)


@settings(deadline=None)
@given(st.lists(st.integers(0, FALLBACK.vocab_size), max_size=40), st.data())
def test_any_byte_tokens_give_the_same_text_however_they_are_pushed(ids, data):
    assert "".join(run(FALLBACK, cut(data.draw, ids))) == text_of(FALLBACK, ids)


@EVERY_TOKENIZER
@given(text=st.text("ab é你😀\U0001f9d1\u200d\U0001f4bb", max_size=12))
def test_no_delta_ends_inside_a_character(tokenizer, text):
    ids = words(tokenizer, text)
    deltas = run(tokenizer, [[i] for i in ids])
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == tokenizer.decode(ids)


def test_a_character_is_given_with_its_last_byte():
    deltas = run(BYTES, [[i] for i in byte_tokens("a你".encode())])
    assert deltas == ["a", "", "", "你", ""]


def test_text_before_an_unfinished_character_in_the_same_token_is_given_at_once():
    stream = TextStream(LONG_TOKEN, ())
    assert stream.push([LONG_TOKEN.vocab_size - 1, *byte_tokens(b"\xe4")]).text == "xabcd"


@EVERY_TOKENIZER
def test_special_tokens_are_left_out(tokenizer):
    ids = [*words(tokenizer, "at"), *sorted(tokenizer.special_ids), *words(tokenizer, "the")]
    assert text_of(tokenizer, ids) == tokenizer.decode(ids)


def test_special_tokens_inside_a_character_do_not_break_it():
    first, *rest = byte_tokens("你".encode())
    assert text_of(BYTES, [first, *sorted(BYTES.special_ids) * 5, *rest]) == "你"


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character():
    ids = byte_tokens("ab你".encode()[:-1])
    assert run(BYTES, [ids]) == ["ab", "\ufffd"]
    assert run(FALLBACK, [fallback_tokens(b"ab\xe4")]) == ["ab", "\ufffd"]


def test_bytes_that_spoil_a_run_do_not_take_back_what_was_shown():
    ids = [*fallback_tokens("你".encode() + b"\xff"), *words(FALLBACK, "at")]
    assert text_of(FALLBACK, ids) == "你\ufffd at"
    assert FALLBACK.decode(ids) == "\ufffd\ufffd\ufffd\ufffd at"


@pytest.mark.parametrize(
    ("tokenizer", "tokens"), [(BYTES, byte_tokens), (FALLBACK, fallback_tokens)]
)
def test_a_long_run_of_invalid_bytes_is_given_on_the_way_and_decoded_in_small_parts(
    tokenizer, tokens
):
    decoded = []

    class Watched:
        special_ids = frozenset()
        vocab_size = tokenizer.vocab_size

        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Watched(), ())
    deltas = [stream.push([i]).text for i in tokens(b"\xff" * 500)]
    assert len("".join(deltas)) > 480
    assert "".join(deltas) + stream.finish() == "\ufffd" * 500
    assert max(decoded) < 20


@pytest.mark.parametrize("length", range(6, 30))
def test_characters_after_a_run_of_invalid_bytes_are_whole_again(length):
    ids = byte_tokens(b"\xff" * length + "😀你b".encode())
    assert text_of(BYTES, ids) == "\ufffd" * length + "😀你b"


# --- stop strings


def pieces(*texts, stop, include=False):
    """Deltas of texts pushed one after the other."""
    return run(BYTES, [words(BYTES, t) for t in texts], stop, include)


def test_a_stop_string_across_tokens_ends_the_text_before_it():
    assert pieces("a</", "st", "op>b", "c", stop=["</stop>"]) == ["a", "", "", "", ""]


def test_what_only_began_like_a_stop_string_is_given_once_it_cannot_be_one():
    assert pieces("a</", "st", "and", stop=["</stop>"]) == ["a", "", "</stand", ""]


def test_a_beginning_that_never_ends_is_given_at_the_finish():
    assert pieces("a</st", stop=["</stop>"]) == ["a", "</st"]


def test_the_string_complete_first_wins_whatever_the_pushes():
    assert "".join(pieces("xabcd", stop=["abcd", "bc"])) == "xa"
    assert "".join(pieces("xa", "b", "c", "d", stop=["abcd", "bc"])) == "xa"
    assert text_of(LONG_TOKEN, [LONG_TOKEN.vocab_size - 1], ["abcd", "bc"]) == "xa"


def test_of_strings_that_end_together_the_longest_wins():
    assert "".join(pieces("xabc", stop=["bc", "abc", "c"])) == "x"


def test_a_stop_string_that_repeats_its_beginning_is_found():
    assert "".join(pieces("a", "a", "a", "b", stop=["aab"])) == "a"


def test_the_stop_string_can_be_kept():
    assert "".join(pieces("a</st", "op>b", stop=["</stop>"], include=True)) == "a</stop>"


def test_a_stop_string_inside_a_characters_bytes_is_seen_when_the_character_is_whole():
    stream = TextStream(BYTES, ("你",))
    deltas = [stream.push([i]) for i in byte_tokens("a你b".encode())]
    texts, stopped = [d.text for d in deltas], [d.stopped for d in deltas]
    assert (texts, stopped) == (["a", "", "", "", ""], [False, False, False, True, True])


def test_a_stopped_stream_says_so_and_gives_nothing_more():
    stream = TextStream(BYTES, ("b",))
    assert stream.push(byte_tokens(b"ab")) == TextDelta("a", True, (0,))
    assert stream.push(byte_tokens(b"abc")) == TextDelta("", True, ())
    assert (stream.finish(), stream.stopped) == ("", True)


def test_a_stop_string_completed_by_the_finish_stops_too():
    stream = TextStream(BYTES, ("a\ufffd",))
    assert stream.push(byte_tokens(b"xa\xe4")) == TextDelta("x", False, (0,))
    assert (stream.finish(), stream.stopped) == ("", True)


@pytest.mark.parametrize(
    ("at_stop_id", "include", "text"),
    [(False, False, "ab!"), (True, False, "ab"), (True, True, "ab!")],
)
def test_the_text_of_a_stop_id_is_hidden_like_a_stop_string(at_stop_id, include, text):
    stream = TextStream(BYTES, (), include)
    assert stream.push(byte_tokens(b"a")) == TextDelta("a", False, (0,))
    ended = stream.end(byte_tokens(b"b!"), at_stop_id=at_stop_id)
    assert "a" + ended.text == text


def test_the_end_gives_held_back_text_and_unfinished_characters():
    stream = TextStream(BYTES, ("abc",))
    assert stream.push(byte_tokens(b"xab")).text == "x"
    assert stream.end(byte_tokens("é".encode()[:1])) == TextDelta("ab\ufffd", False, (1, 2, 3))


def test_a_stop_string_may_be_completed_by_the_last_tokens():
    stream = TextStream(BYTES, ("abc",))
    stream.push(byte_tokens(b"xab"))
    assert stream.end(byte_tokens(b"cd")) == TextDelta("", True, ())


# --- min_tokens and offsets


@settings(deadline=None, max_examples=150)
@given(byte_level_cases(), st.integers(0, 12))
def test_a_stop_string_counts_only_if_it_ends_after_the_first_min_tokens(case, min_tokens):
    pushes, stop, include = case
    stream = TextStream(BYTES, tuple(stop), include, min_tokens=min_tokens)
    text = "".join(stream.push(ids).text for ids in pushes) + stream.finish()
    ids = [i for push in pushes for i in push]
    free = TextStream(BYTES, ())
    before = free.push(ids[:min_tokens]).text
    after = free.push(ids[min_tokens:]).text + free.finish()
    counting = stop if len(ids) > min_tokens else []
    assert text == cut_after(before, after, counting, include)


def cut_after(before, after, stop, include):
    """The naive oracle: text cut at the first stop string that is complete behind `before`."""
    for end in range(len(before) + 1, len(before + after) + 1):
        text = (before + after)[:end]
        if found := [s for s in stop if text.endswith(s)]:
            return text[: end if include else end - len(max(found, key=len))]
    return before + after


@settings(deadline=None, max_examples=150)
@given(byte_level_cases())
def test_each_token_that_the_text_reaches_is_named_once_in_order(case):
    pushes, stop, include = case
    stream = TextStream(BYTES, tuple(stop), include)
    deltas = [*(stream.push(ids) for ids in pushes), stream.end(())]
    offsets = [offset for delta in deltas for offset in delta.offsets]
    text = "".join(delta.text for delta in deltas)
    count = sum(map(len, pushes))
    assert offsets == sorted(offsets)
    if not stream.stopped:
        assert len(offsets) == count
    else:
        assert len(offsets) <= count
        assert all(offset < len(text) for offset in offsets)
    sent = 0
    for delta in deltas[:-1]:
        assert all(offset < sent + len(delta.text) for offset in delta.offsets)
        sent += len(delta.text)


def test_tokens_of_a_character_are_named_with_it_and_begin_where_it_does():
    stream = TextStream(BYTES, ())
    offsets = [stream.push([i]).offsets for i in byte_tokens("a\u4f60b".encode())]
    assert offsets == [(0,), (), (), (1, 1, 1), (2,)]


def test_tokens_of_held_back_text_are_named_when_it_is_given():
    stream = TextStream(BYTES, ("bcd",))
    offsets = [stream.push([i]).offsets for i in byte_tokens(b"abcx")]
    assert offsets == [(0,), (), (), (1, 2, 3)]


def test_tokens_of_a_stop_string_are_named_only_if_it_is_kept():
    for include, offsets in ((False, (0,)), (True, (0, 1, 2))):
        stream = TextStream(BYTES, ("bc",), include)
        assert stream.push(byte_tokens(b"abcd")).offsets == offsets


def test_a_token_cut_in_the_middle_is_named():
    stream = TextStream(LONG_TOKEN, ("bc",))
    assert stream.push([LONG_TOKEN.vocab_size - 1]) == TextDelta("xa", True, (0,))


def test_special_tokens_are_named_with_what_follows_them_or_at_the_end():
    stream = TextStream(BYTES, ())
    assert stream.push([0]).offsets == ()
    assert stream.push(byte_tokens(b"a")).offsets == (0, 0)
    assert stream.end([0, 1], at_stop_id=True).offsets == (1,)
