"""The reward of tokens against the reward of their text, which `test_grammar.py` tests."""

import jax
import numpy as np
import pytest
from support import grammar
from support.tasks import WORDS, encoded
from support.token_reward import gold_reward

import dpo_eqx as dpx

WIDTHS = (4, 8)


def of_tokens(prompt, ids, mask):
    """The reward of each row of ids, as samples of one prompt."""
    prompts = WORDS.prompts(encoded([prompt]), WIDTHS[0])
    return np.asarray(jax.jit(gold_reward)(prompts, dpx.Tokens(ids[None], mask[None])))[0]


def all_reviews(prompt):
    clauses = list(grammar.clauses(prompt))
    pairs = [f"{one} and {other}" for one in clauses for other in clauses]
    return [f" was {text}." for text in [*clauses, *pairs]]


@pytest.mark.parametrize("prompt", ["The inn soup", "The pub attic", "The mill guide"])
def test_every_review_of_the_grammar_is_worth_what_its_text_is(prompt):
    texts = all_reviews(prompt)
    tokens = WORDS.completions(encoded(texts), WIDTHS[1])
    got = of_tokens(prompt, tokens.ids, tokens.mask)
    assert got.tolist() == [grammar.gold_reward(prompt, text) for text in texts]
    assert len(set(got)) > 20


def test_what_the_grammar_would_not_write_is_worth_the_least():
    """Reviews with one wrong token each, and random tokens up to the end of the row."""
    prompt, rng = "The inn soup", np.random.default_rng(0)
    tokens = WORDS.completions(encoded(all_reviews(prompt)), WIDTHS[1])
    ids, mask = tokens.ids.copy(), tokens.mask.copy()
    places = rng.integers(0, mask.sum(axis=1) - 1)  # never the end token, which has no text
    ids[np.arange(len(ids)), places] = rng.integers(0, WORDS.end, len(ids))
    ids[:100], mask[:100] = rng.integers(0, WORDS.end, (100, WIDTHS[1])), True
    texts = WORDS.decode(dpx.Tokens(ids, mask))
    want = [grammar.gold_reward(prompt, text.decode()) for text in texts]
    assert of_tokens(prompt, ids, mask).tolist() == want
    assert len(want) > np.sum(np.equal(want, grammar.WORST)) > 500


@pytest.mark.parametrize(
    ("text", "length", "worth"),
    [
        (b" was tasty.", 3, 2.0),  # the row is full, without room for the end token
        (b" was tasty. and bad.", 3, 2.0),  # what is behind the mask does not count
        (b" was tasty. and bad.", 6, grammar.WORST),
        (b" was tasty. good", 4, grammar.WORST),
        (b" was tasty superb bad.", 5, grammar.WORST),
    ],
)
def test_a_text_ends_where_the_mask_does(text, length, worth):
    ids = np.array([WORDS.encode(text)])
    mask = np.arange(ids.shape[1])[None] < length
    assert of_tokens("The inn soup", ids, mask).tolist() == [worth]
