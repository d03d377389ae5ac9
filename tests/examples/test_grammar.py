"""The grammar of the quickstart: what it writes, what that is worth, and who prefers it."""

import math
import random

import pytest
from support import grammar


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        (" was tasty.", 2.0),
        (" was very tasty.", 3.0),
        (" was quite bland.", -0.5),
        (" was not awful.", 1.0),
        (" was very superb and very tasty.", 6.0),
        (" was very tasty and not good.", 2.5),
        (" was very awful and very stale.", -6.0),
    ],
)
def test_reward_is_the_sum_over_clauses(completion, worth):
    assert grammar.gold_reward("The inn soup", completion) == worth


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " was .",
        " was tasty",
        " was tasty. ",
        " was rude.",  # of a host
        " was very very tasty.",
        " was tasty and tasty and tasty.",
        " was tasty and.",
        " is tasty.",
    ],
)
def test_what_the_grammar_would_not_write_is_worth_the_least(completion):
    assert grammar.gold_reward("The inn soup", completion) == grammar.WORST


def test_everything_written_is_in_the_grammar():
    rng = random.Random(0)
    prompts = grammar.all_prompts()
    written = [(prompt, grammar.write_review(prompt, rng)) for prompt in prompts * 20]
    worth = [grammar.gold_reward(*review) for review in written]
    assert len(set(prompts)) == len(prompts) == 96
    # Only twice the very worst is worth as little as what is no sentence: 2/3 of (2/32)^2.
    assert sum(x == grammar.WORST for x in worth) < 0.01 * len(worth)
    assert min(worth) >= grammar.WORST
    assert abs(sum(worth) / len(worth)) < 0.2


def test_worst_is_the_lowest_of_all_reviews():
    lowest = [min(grammar.clauses(prompt).values()) for prompt in grammar.all_prompts()]
    assert max(grammar.LENGTHS) * min(lowest) == grammar.WORST


def test_words_spell_every_prompt_and_review():
    rng = random.Random(0)
    for prompt in grammar.all_prompts():
        text = prompt + grammar.write_review(prompt, rng)
        for word in sorted(grammar.words(), key=len, reverse=True):
            text = text.replace(word, "")
        assert text == ""


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match=r"`prompt` must be one of `all_prompts\(\)`; got 'A'"):
        grammar.gold_reward("A", " was tasty.")


@pytest.mark.parametrize("difference", [-3.0, -0.5, 0.0, 0.5, 1.5, 4.0])
def test_labels_are_as_frequent_as_bradley_terry_says(difference):
    rng, draws = random.Random(0), 20_000
    preferred = sum(grammar.prefers_first(1.0 + difference, 1.0, rng) for _ in range(draws))
    probability = math.exp(difference) / (math.exp(difference) + 1)
    error = (probability * (1 - probability) / draws) ** 0.5
    assert abs(preferred / draws - probability) < 3.5 * error
