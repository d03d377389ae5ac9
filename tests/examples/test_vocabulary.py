"""Text to tokens: what is kept of long texts, and that nothing changes on the way back."""

import random

import numpy as np
import pytest
import quickstart
from support import grammar
from support.tasks import WORDS
from support.vocabulary import BYTES, Pair, Vocabulary, Widths, in_chunks


def test_bytes_there_and_back():
    texts = [bytes(range(256)), "é\n\0".encode(), b""]
    tokens = BYTES.completions(texts, 300)
    assert BYTES.decode(tokens) == texts
    assert tokens.mask.sum(axis=1).tolist() == [257, 5, 1]


def test_reviews_there_and_back_in_the_width_that_is_set():
    rng, widths = random.Random(0), quickstart.REVIEWS.widths
    prompts = grammar.all_prompts() * 5
    completions = [grammar.write_review(prompt, rng).encode() for prompt in prompts]
    batch = WORDS.texts([prompt.encode() for prompt in prompts], completions, widths)
    assert WORDS.decode(batch.completion) == completions
    assert WORDS.decode(batch.prompt) == [prompt.encode() for prompt in prompts]
    ends = (batch.completion.ids == WORDS.end) & batch.completion.mask
    np.testing.assert_array_equal(ends.sum(axis=1), 1)
    assert batch.completion.mask.sum(axis=1).max() == widths.completion


def test_whatever_a_policy_writes_can_be_read_again():
    words, rng = WORDS, random.Random(0)
    for _ in range(200):
        ids = rng.choices(range(words.end), k=8)
        text = b"".join(words.pieces[i] for i in ids)
        assert words.encode(text) == ids


def test_prompts_keep_their_end_and_completions_their_start():
    batch = BYTES.pairs([Pair(b"abcdef", b"uvwxyz", b"u")], Widths(4, 3))
    assert bytes(batch.prompt.ids[0].tolist()) == b"cdef"
    assert bytes(batch.chosen.ids[0].tolist()) == b"uvw"
    assert batch.rejected.ids[0, :2].tolist() == [ord("u"), BYTES.end]
    assert batch.rejected.mask[0].tolist() == [True, True, False]


def test_an_unknown_word_is_no_piece():
    with pytest.raises(KeyError, match="c"):
        Vocabulary([b"a", b"b"], rb".").encode(b"abc")


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_chunks_hold_every_pair_once(count):
    pairs = [Pair(b"p%d" % i, b"a", b"b") for i in range(count)]
    chunks = in_chunks(BYTES.pairs(pairs, Widths(4, 4)), 4)
    seen = [
        prompt
        for chunk in chunks
        for prompt, weight in zip(BYTES.decode(chunk.prompt), chunk.weight, strict=True)
        if weight == 1
    ]
    assert seen == [pair.prompt for pair in pairs]
    assert {chunk.pairs for chunk in chunks} == {4}
    assert sum(chunk.weight.sum() for chunk in chunks) == count
