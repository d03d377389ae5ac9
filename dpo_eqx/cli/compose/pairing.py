"""From samples with rewards to lines of preferences, by the rules of `dpx.pair_samples`.

Nothing here judges: the rewards are given.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from ..._arrays.tokens import Tokens
from ..._onpolicy.pair_samples import pair_samples

How = Literal["best_worst", "all", "random"]
_TEMPLATE = ("tools", "chat_template_kwargs")


@dataclasses.dataclass
class Account:
    """Counts of prompts and pairs; `str(account)` says them in a line.

    - `prompts`, `answers`, `pairs`: their numbers.
    - `all_equal`: prompts whose answers all have one reward.
    - `without`: prompts without a pair, those of `all_equal` included.
    - `cut`: answers left out, since they were cut off.
    - `ties`: other pairs of equal rewards; `below`: pairs that differ by less than `--min-gap`.
    """

    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    all_equal: int = 0
    without: int = 0
    ties: int = 0
    below: int = 0
    cut: int = 0

    def __str__(self):
        words = [f"pairs: {self.pairs}, of {self.answers} answers to {self.prompts} prompts"]
        left_out = {
            "answers that were cut off, left out": self.cut,
            "prompts without a pair": self.without,
            "prompts whose answers all have one reward": self.all_equal,
            "other pairs of equal rewards, left out": self.ties,
            "pairs whose rewards differ by less than `--min-gap`, left out": self.below,
        }
        return "; ".join([*words, *(f"{what}: {n}" for what, n in left_out.items() if n)])


def without_cut(
    lines: Sequence[Mapping[str, Any]], rewards: Sequence[Sequence[float]], account: Account
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """The lines and rewards of the answers that ended by themselves; `account` counts the others.

    No line is left out, so that a prompt keeps its number.
    """
    columns = ("answers", "answer_ids")
    kept = [[i for i, is_ended in enumerate(line["ended"]) if is_ended] for line in lines]
    account.cut += sum(len(line["ended"]) for line in lines) - sum(map(len, kept))
    shorter = [
        {**line, **{name: [line[name][i] for i in own] for name in columns if name in line}}
        for line, own in zip(lines, kept, strict=True)
    ]
    return shorter, [[row[i] for i in own] for row, own in zip(rewards, kept, strict=True)]


def preferences(
    lines: Sequence[Mapping[str, Any]],
    rewards: Sequence[Sequence[float]],
    *,
    how: How,
    min_gap: float,
    seed: int,
    account: Account,
) -> Iterator[dict[str, Any]]:
    """The preferences of all prompts, in the order of the prompts.

    **Arguments:**

    - `lines`: lines of a file of samples; `rewards`: the rewards of their answers.
    - `how`, `min_gap`: as in `dpx.pair_samples`; `seed`: the seed of `how="random"`.
    - `account`: counts the prompts and their pairs, also those that are left out.
    """
    found = _pairs_of_all(rewards, how, min_gap, seed)
    for line, scores, pairs in zip(lines, rewards, found, strict=True):
        account.prompts += 1
        account.answers += len(scores)
        kept = 0
        for chosen, rejected in pairs.tolist():
            gap = scores[chosen] - scores[rejected]
            if gap > 0 and gap >= min_gap:
                kept += 1
                yield _preference(line, scores, chosen, rejected)
            elif len(set(scores)) > 1:
                account.ties += gap == 0
                account.below += gap > 0
        account.pairs += kept
        account.without += not kept
        account.all_equal += len(set(scores)) == 1


def _pairs_of_all(
    rewards: Sequence[Sequence[float]], how: How, min_gap: float, seed: int
) -> list[Int[np.ndarray, "pairs 2"]]:
    """The numbers of the chosen and the rejected answer of each candidate pair of each prompt."""
    places = collections.defaultdict(list)
    for place, scores in enumerate(rewards):
        places[len(scores)].append(place)
    found: list[Any] = [np.zeros((0, 2), int)] * len(rewards)
    # In float64, so that rewards that differ as Python numbers are no tie.
    with jax.enable_x64(True):
        for count, rows in places.items():
            if count < 2:
                continue
            scores = np.array([rewards[place] for place in rows], np.float64)
            for place, pairs in zip(rows, _pairs(scores, rows, how, seed), strict=True):
                found[place] = pairs
    return found


def _pairs(
    rewards: Float[np.ndarray, "prompts samples"], numbers: Sequence[int], how: How, seed: int
) -> Int[np.ndarray, "prompts pairs 2"]:
    """`pair_samples` on answers whose only token is their own number."""
    prompts, samples = rewards.shape
    prompt = Tokens(np.zeros((prompts, 1), np.int32), np.ones((prompts, 1), bool))
    ids = np.broadcast_to(np.arange(samples, dtype=np.int32)[:, None], (prompts, samples, 1))
    key = jax.random.key(seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(numbers, np.uint32))
    batch = pair_samples(prompt, Tokens(ids, np.ones(ids.shape, bool)), rewards, how=how, key=keys)
    sides = (np.asarray(side.ids).reshape(prompts, -1) for side in (batch.chosen, batch.rejected))
    return np.stack(list(sides), axis=-1)


def _preference(
    line: Mapping[str, Any], scores: Sequence[float], chosen: int, rejected: int
) -> dict[str, Any]:
    """A line that `train` reads: ids if the prompt was given as ids, else texts or messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    found = {f"{name}_score": scores[place] for name, place in sides.items()}
    if "prompt_ids" in line:
        ids = {f"{name}_ids": line["answer_ids"][place] for name, place in sides.items()}
        return {"prompt_ids": line["prompt_ids"], **ids, **found}
    answers: dict[str, Any] = {name: line["answers"][place] for name, place in sides.items()}
    if isinstance(line["prompt"], list):
        answers = {n: [{"role": "assistant", "content": text}] for n, text in answers.items()}
    carried = {name: line[name] for name in _TEMPLATE if name in line}
    return {"prompt": line["prompt"], **carried, **answers, **found}
