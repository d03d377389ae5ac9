"""A small grammar of one-sentence reviews, and how good each of them is: the gold reward.

The beginning of a sentence is the prompt, the rest the completion; nothing here knows of models.
"""

import itertools
import math
import random
import re

PLACES = (
    *("abbey", "camp", "castle", "chalet", "cottage", "farm", "ferry", "hostel"),
    *("hotel", "inn", "lodge", "manor", "mill", "pub", "tower", "villa"),
)
THINGS = {"food": ("soup", "bread"), "room": ("lobby", "attic"), "host": ("guide", "waiter")}
ANYTHING = {"superb": 2.0, "good": 1.0, "bad": -1.0, "awful": -2.0}
# What can be said of a thing of each kind: nothing else is in the grammar.
ADJECTIVES = {
    "food": {"tasty": 2.0, "fresh": 1.0, "bland": -1.0, "stale": -2.0, **ANYTHING},
    "room": {"cosy": 2.0, "clean": 1.0, "cold": -1.0, "dirty": -2.0, **ANYTHING},
    "host": {"kind": 2.0, "quick": 1.0, "slow": -1.0, "rude": -2.0, **ANYTHING},
}
ADVERBS = {"": 1.0, "very ": 1.5, "quite ": 0.5, "not ": -0.5}
LENGTHS = (1, 2, 2)  # clauses in a review, each as likely: two thirds have two
WORST = -6.0  # no review is worth less: twice "very awful"


def all_prompts() -> list[str]:
    """Every beginning of a sentence, such as `"The inn soup"`."""
    things = itertools.chain(*THINGS.values())
    return [f"The {place} {thing}" for thing, place in itertools.product(things, PLACES)]


def words() -> list[str]:
    """All that reviews are made of; what stands inside a sentence comes with the space before."""
    listed = [*PLACES, *itertools.chain(*THINGS.values()), *itertools.chain(*ADJECTIVES.values())]
    inside = dict.fromkeys(["was", "and", *listed, *(adverb.strip() for adverb in ADVERBS)])
    return ["The", ".", *(f" {word}" for word in inside if word)]


def clauses(prompt: str) -> dict[str, float]:
    """What can be said to complete the prompt, `"very tasty"`, and its worth: the product."""
    thing = prompt.rsplit(" ", 1)[-1]
    kind = next((kind for kind, things in THINGS.items() if thing in things), None)
    if kind is None:
        raise ValueError(f"`prompt` must be one of `all_prompts()`, got {prompt!r}.")
    pairs = itertools.product(ADVERBS.items(), ADJECTIVES[kind].items())
    return {adverb + word: factor * worth for (adverb, factor), (word, worth) in pairs}


def write_review(prompt: str, rng: random.Random) -> str:
    """A completion drawn from the grammar, such as `" was very tasty and not stale."`."""
    words = rng.choices(list(clauses(prompt)), k=rng.choice(LENGTHS))
    return f" was {' and '.join(words)}."


def gold_reward(prompt: str, completion: str) -> float:
    """How good the review is: the sum over its clauses, from `WORST` to `-WORST`.

    What the grammar would not write after the prompt ("The inn soup was rude.") is worth
    `WORST`, as little as the worst review.
    """
    worth = clauses(prompt)
    match = re.fullmatch(r" was (.+)\.", completion)
    said = match[1].split(" and ") if match else []
    if len(said) not in LENGTHS or not worth.keys() >= set(said):
        return WORST
    return sum(worth[clause] for clause in said)


def prefers_first(first: float, second: float, rng: random.Random) -> bool:
    """Bradley-Terry: of two rewards the first is preferred with probability sigmoid(difference)."""
    return rng.random() < 1 / (1 + math.exp(second - first))
