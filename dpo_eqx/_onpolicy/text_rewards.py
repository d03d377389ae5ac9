"""Rewards from a Python function of texts: samples are decoded, and judged in batches on the host.

A reward that is a JAX function of tokens needs none of this, and runs inside of `jit` by itself.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from .._arrays.batches import check_prompt, is_concrete
from .._arrays.samples import Samples
from .._arrays.tokens import Tokens
from .._jax.describe import described

# Takes prompts and answers, lists of one length, and returns a number for each answer.
TextReward = Callable[[list[Any], list[str]], Any]
_SHOWN = 80  # characters of a text in an error


class _TooSlowError(Exception):
    """A call took longer than its timeout. Not `TimeoutError`, which the function may raise."""


def text_rewards(
    function: TextReward,
    tokenizer: Any,
    *,
    batch_size: int = 64,
    timeout: float | None = None,
) -> Callable[[Tokens, Samples | Tokens], Float[Array | np.ndarray, "prompts samples"]]:
    """A reward of samples from a Python function of texts, such as a regular expression or a judge.

    ```python
    reward = dpx.text_rewards(lambda prompts, answers: [-len(a) for a in answers], tokenizer)
    batch = dpx.pair_samples(prompt, samples, reward(prompt, samples))
    ```

    The reward decodes each prompt and each sample, without BOS and EOS. Outside of transformations
    it runs as it is, on the host. Under `jit` it runs through `jax.pure_callback`, which moves the
    tokens to the host and waits there; its errors are then `jax.errors.JaxRuntimeError` with the
    same message.

    **Arguments:**

    - `function`: `function(prompts, answers)` with two lists of texts of one length, at most
        `batch_size`. It returns a number for each answer, in their order; larger is better.
    - `tokenizer`: anything with `decode(ids) -> str`. The ids in its attributes `bos_token_id` and
        `eos_token_id` are left out of the texts.
    - `batch_size`: the largest number of texts in a call.
    - `timeout`: the longest time of a call, in seconds (default: no limit).

    **Returns:**

    A function of the prompts, of shape `(prompts, length)`, and of samples of shape
    `(prompts, samples, completion)`. It returns the rewards, of shape `(prompts, samples)`.

    **Raises:**

    `ValueError` if an argument is out of range. The reward raises `ValueError` with the text if
    `function` raises, takes longer than `timeout`, or returns anything but a finite number for each
    answer.
    """
    if not hasattr(tokenizer, "decode"):
        raise ValueError(f"`tokenizer` must have `decode(ids) -> str`; got {described(tokenizer)}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive; got {batch_size}.")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"`timeout` must be positive; got {timeout}.")

    def on_host(prompt: Tokens, tokens: Tokens) -> Float[np.ndarray, "prompts samples"]:
        prompts = [text for (text,) in _texts(tokenizer, prompt.ids[:, None], prompt.mask[:, None])]
        answers = _texts(tokenizer, tokens.ids, tokens.mask)
        shape = tokens.ids.shape[:2]
        repeated = [text for text in prompts for _ in range(shape[1])]
        flat = [text for row in answers for text in row]
        rewards = judge_texts(function, repeated, flat, batch_size=batch_size, timeout=timeout)
        return rewards.reshape(shape).astype(jax.dtypes.canonicalize_dtype(float))

    def reward(
        prompt: Tokens, samples: Samples | Tokens
    ) -> Float[Array | np.ndarray, "prompts samples"]:
        tokens = samples.tokens if isinstance(samples, Samples) else samples
        check_prompt(prompt)
        if is_concrete(prompt.ids) and is_concrete(tokens.ids):
            return on_host(prompt, tokens)
        dtype = jax.dtypes.canonicalize_dtype(float)
        result = jax.ShapeDtypeStruct(tokens.ids.shape[:2], dtype)
        return jax.pure_callback(on_host, result, prompt, tokens, vmap_method="sequential")

    return reward


def judge_texts(
    function: TextReward,
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    batch_size: int,
    timeout: float | None = None,
) -> Float[np.ndarray, " answers"]:
    """The rewards of answers to prompts, in float64, from calls of at most `batch_size` answers.

    **Raises:**

    `ValueError` as the reward of `text_rewards` does.
    """
    parts = [np.zeros(0)]
    for start in range(0, len(answers), batch_size):
        part = slice(start, start + batch_size)
        parts.append(_judge(function, list(prompts[part]), list(answers[part]), timeout))
    return np.concatenate(parts)


def _judge(
    function: TextReward, prompts: list[Any], answers: list[str], timeout: float | None
) -> Float[np.ndarray, " answers"]:
    """The checked rewards of one call."""
    try:
        found = _within(timeout, lambda: function(list(prompts), list(answers)))
    except _TooSlowError:
        raise ValueError(
            f"`function` must return within {timeout:g} s; it has not returned for "
            f"{len(answers)} answers, the first of which is {_about(prompts[0], answers[0])}. "
            "Allow more time by `timeout`, or judge fewer answers at once by `batch_size`."
        ) from None
    except Exception as error:  # a function of the user can raise anything
        place = _offender(function, prompts, answers, timeout) if len(answers) > 1 else 0
        which = (
            f"the answers of a batch of {len(answers)}, though not for each of them alone; the "
            f"first is {_about(prompts[0], answers[0])}"
            if place is None
            else f"the answer {_about(prompts[place], answers[place])}"
        )
        raise ValueError(
            f"`function` must return a reward for each answer; it raised {type(error).__name__}: "
            f"{error} for {which}."
        ) from error
    return _checked(found, prompts, answers)


def _checked(found: Any, prompts: list[Any], answers: list[str]) -> Float[np.ndarray, " answers"]:
    """What a call returned, as one finite number for each answer."""
    try:
        rewards = np.asarray(found)
        # A text such as "1" would become a number without this.
        is_number = rewards.dtype.kind in "biuf" or str(rewards.dtype) == "bfloat16"
        rewards = rewards.astype(np.float64) if is_number else None
    except Exception:  # a ragged list, or an array of another library
        rewards = None
    if rewards is None or rewards.shape != (len(answers),):
        got = described(found) if rewards is None else f"shape {rewards.shape}"
        raise ValueError(
            f"`function` must return a list or array of {len(answers)} numbers, one for each "
            f"answer; got {got}. The first answer is {_about(prompts[0], answers[0])}."
        )
    if not np.isfinite(rewards).all():
        place = int(np.argmin(np.isfinite(rewards)))
        raise ValueError(
            f"`function` must return finite rewards; got {rewards[place]} for the answer "
            f"{_about(prompts[place], answers[place])}."
        )
    return rewards


def _offender(
    function: TextReward, prompts: list[Any], answers: list[str], timeout: float | None
) -> int | None:
    """The first answer for which `function` raises when it is called with it alone, if any."""
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        try:
            _within(timeout, lambda prompt=prompt, answer=answer: function([prompt], [answer]))
        except Exception:
            return place
    return None


def _within(timeout: float | None, call: Callable[[], Any]) -> Any:
    """The result of `call`, or `_TooSlowError` after that many seconds."""
    if timeout is None:
        return call()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run():
        try:
            outcome.append((call(), None))
        except BaseException as error:  # it is raised again in the thread that waits
            outcome.append((None, error))

    # A daemon: a thread cannot be ended, and must not keep the process alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise _TooSlowError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _texts(tokenizer: Any, ids: Any, mask: Any) -> list[list[str]]:
    """The texts of rows of samples, without BOS and EOS."""
    specials = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos")}

    def text(row, real):
        return tokenizer.decode([i for i in row[real].tolist() if i not in specials])

    pairs = zip(np.asarray(ids), np.asarray(mask), strict=True)
    return [[text(*sample) for sample in zip(*pair, strict=True)] for pair in pairs]


def _about(prompt: Any, answer: str) -> str:
    """An answer and its prompt in an error, both shortened; a prompt may be messages."""
    return f"{_short(repr(answer))} to the prompt {_short(repr(prompt))}"


def _short(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
