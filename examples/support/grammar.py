"""A small grammar of one-sentence reviews, and the gold reward, which says how good a review is.

The start of a sentence is the prompt, and the rest is the completion. This file uses no models.
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
# The adjectives that the grammar allows for each kind of thing, with their worth.
ADJECTIVES = {
    "food": {"tasty": 2.0, "fresh": 1.0, "bland": -1.0, "stale": -2.0, **ANYTHING},
    "room": {"cosy": 2.0, "clean": 1.0, "cold": -1.0, "dirty": -2.0, **ANYTHING},
    "host": {"kind": 2.0, "quick": 1.0, "slow": -1.0, "rude": -2.0, **ANYTHING},
}
ADVERBS = {"": 1.0, "very ": 1.5, "quite ": 0.5, "not ": -0.5}
LENGTHS = (1, 2, 2)  # clauses in a review, drawn uniformly: two thirds of the reviews have two
WORST = -6.0  # the lowest reward of a review, "very awful and very awful"


def all_prompts() -> list[str]:
    """Every start of a sentence, such as `"The inn soup"`."""
    things = itertools.chain(*THINGS.values())
    return [f"The {place} {thing}" for thing, place in itertools.product(things, PLACES)]


def words() -> list[str]:
    """All words of reviews; a word inside a sentence includes the space before it."""
    listed = [*PLACES, *itertools.chain(*THINGS.values()), *itertools.chain(*ADJECTIVES.values())]
    inside = dict.fromkeys(["was", "and", *listed, *(adverb.strip() for adverb in ADVERBS)])
    return ["The", ".", *(f" {word}" for word in inside if word)]


def clauses(prompt: str) -> dict[str, float]:
    """Clauses that can complete the prompt, such as `"very tasty"`, and the worth of each.

    The worth is the product of the adverb's factor and the adjective's worth.
    """
    thing = prompt.rsplit(" ", 1)[-1]
    kind = next((kind for kind, things in THINGS.items() if thing in things), None)
    if kind is None:
        raise ValueError(f"`prompt` must be one of `all_prompts()`; got {prompt!r}.")
    pairs = itertools.product(ADVERBS.items(), ADJECTIVES[kind].items())
    return {adverb + word: factor * worth for (adverb, factor), (word, worth) in pairs}


def write_review(prompt: str, rng: random.Random) -> str:
    """A completion drawn from the grammar, such as `" was very tasty and not stale."`."""
    words = rng.choices(list(clauses(prompt)), k=rng.choice(LENGTHS))
    return f" was {' and '.join(words)}."


def gold_reward(prompt: str, completion: str) -> float:
    """The sum of the worth of a review's clauses, from `WORST` to `-WORST`.

    A completion that the grammar does not allow ("The inn soup was rude.") is worth `WORST`.
    """
    worth = clauses(prompt)
    match = re.fullmatch(r" was (.+)\.", completion)
    found = match[1].split(" and ") if match else []
    if len(found) not in LENGTHS or not worth.keys() >= set(found):
        return WORST
    return sum(worth[clause] for clause in found)


def prefers_first(first: float, second: float, rng: random.Random) -> bool:
    """Bradley-Terry: prefers the first of two rewards with probability sigmoid(difference)."""
    return rng.random() < 1 / (1 + math.exp(second - first))
