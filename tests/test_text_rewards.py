"""Rewards of a Python function of texts: decoded, in batches, the same under `jit`; its errors."""

import re
import time

import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx.data import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["Why?", "So"]
ANSWERS = [["a", "bcd", ""], ["yes", "no", "maybe"]]


def tokens(rows, width=8):
    """Texts as ids, with an EOS, and with garbage behind their ends."""
    ids = np.full((*np.shape(rows), width), ord("x"), np.int32)
    mask = np.zeros(ids.shape, bool)
    for place, text in np.ndenumerate(np.array(rows, object)):
        row = [*text.encode(), TOKENIZER.eos_token_id]
        ids[place][: len(row)], mask[place][: len(row)] = row, True
    return dpx.Tokens(ids, mask)


PROMPT, SAMPLES = tokens(PROMPTS), tokens(ANSWERS)


def lengths(prompts, answers):
    return [10 * len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]


EXPECTED = np.array([[41, 43, 40], [23, 22, 25]], float)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_each_answer_has_its_reward_in_any_batch(batch_size):
    seen = []

    def function(prompts, answers):
        seen.append(list(zip(prompts, answers, strict=True)))
        return lengths(prompts, answers)

    rewards = dpx.text_rewards(function, TOKENIZER, batch_size=batch_size)(PROMPT, SAMPLES)
    assert np.array_equal(rewards, EXPECTED)
    assert [x for call in seen for x in call] == [
        (p, a) for p, row in zip(PROMPTS, ANSWERS, strict=True) for a in row
    ]
    assert max(map(len, seen)) == min(batch_size, 6)


def test_bos_and_eos_are_no_text():
    class Numbers:
        bos_token_id, eos_token_id = ord("a"), TOKENIZER.eos_token_id

        def decode(self, ids):
            return " ".join(map(str, ids))

    seen = []
    dpx.text_rewards(lambda p, a: seen.extend(a) or [0] * len(a), Numbers())(PROMPT, SAMPLES)
    assert seen[:3] == ["", "98 99 100", ""]


def test_the_same_under_jit():
    reward = dpx.text_rewards(lengths, TOKENIZER)
    assert np.array_equal(jax.jit(reward)(PROMPT, SAMPLES), EXPECTED)


@pytest.mark.parametrize("kind", [np.array, np.float32, lambda x: np.array(x, np.int8), tuple])
def test_numbers_of_several_kinds(kind):
    reward = dpx.text_rewards(lambda p, a: kind(lengths(p, a)), TOKENIZER)
    assert np.array_equal(reward(PROMPT, SAMPLES), EXPECTED)


def raises_at_bcd(prompts, answers):
    if "bcd" in answers:
        raise KeyError("oh")
    return [0.0] * len(answers)


def raises_in_company(prompts, answers):
    if len(answers) > 1:
        raise OSError("too many")
    return [0.0]


def sleeps(prompts, answers):
    time.sleep(2)


def gives(value):
    return lambda prompts, answers: value


BAD = {
    "raises": (raises_at_bcd, "it raised KeyError: 'oh' for the answer 'bcd' to the prompt 'Why?'"),
    "raises for several": (raises_in_company, "too many for the answers of a batch of 6, though"),
    "its own timeout": (
        lambda p, a: (_ for _ in ()).throw(TimeoutError("net")),
        "it raised TimeoutError: net for the answer 'a' to",
    ),
    "nan": (gives([0, 1, 2, np.nan, 1, 1]), "got nan for the answer 'yes' to the prompt 'So'"),
    "infinite": (gives([0, np.inf, 2, 3, 1, 1]), "got inf for the answer 'bcd'"),
    "too few": (gives([0.0]), "6 numbers, one for each answer; got shape (1,)"),
    "a table": (gives(np.zeros((2, 3))), "got shape (2, 3)"),
    "texts": (gives(["1"] * 6), "got a list of 6: '1'; '1'"),
    "nothing": (gives(None), "got None"),
    "ragged": (gives([[1], [1, 2]]), "got a list of 2"),
    "blocks": (sleeps, "must return within 0.1 s; it has not returned for 6 answers, the first"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_show_the_text(case):
    function, words = BAD[case]
    reward = dpx.text_rewards(function, TOKENIZER, timeout=0.1)
    with pytest.raises(ValueError, match=re.escape(words)):
        reward(PROMPT, SAMPLES)


def test_an_error_under_jit_has_the_text():
    reward = jax.jit(dpx.text_rewards(raises_at_bcd, TOKENIZER))
    with pytest.raises(jax.errors.JaxRuntimeError, match="for the answer 'bcd'"):
        reward(PROMPT, SAMPLES).block_until_ready()


def test_arguments(unchecked):
    with pytest.raises(ValueError, match=r"`tokenizer` must have `decode\(ids\) -> str`; got None"):
        dpx.text_rewards(lengths, None)
    with pytest.raises(ValueError, match="`batch_size` must be positive; got 0"):
        dpx.text_rewards(lengths, TOKENIZER, batch_size=0)
    with pytest.raises(ValueError, match="`timeout` must be positive; got 0"):
        dpx.text_rewards(lengths, TOKENIZER, timeout=0)
