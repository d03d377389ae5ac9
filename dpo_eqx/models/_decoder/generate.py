"""Draws completions from a policy: one or several for each prompt.

`decode.py` runs the policy, and `sample.py` chooses a token from its logits.
"""

import operator
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..._arrays.batches import is_concrete
from ..._arrays.samples import Samples
from ..._arrays.tokens import Tokens, as_ids
from ..._jax.describe import described
from ..._jax.explicit_meshes import automatic
from ..._jax.keys import Keys, keys_per_row
from ..._jax.scalars import Number
from ..._scoring.policy_checks import check_is_policy
from .decode import Ends, decode
from .sample import choose
from .transformer import Transformer

Ids = int | np.integer | Sequence[int | np.integer] | Array | np.ndarray


@partial(automatic, like=1)
def sample(
    policy: PyTree,
    prompt: Tokens,
    *,
    samples: int | np.integer,
    max_new_tokens: int | np.integer,
    temperature: Number = 1.0,
    top_k: int | np.integer | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    key: Keys | None = None,
    eos: Ids | None = None,
    stop: Sequence[Sequence[int]] | None = None,
) -> Samples:
    """Draws several completions of each prompt, with their log-probabilities.

    ```python
    samples = models.sample(policy, prompt, samples=4, max_new_tokens=64, key=key, eos=2)
    ```

    The function is jitted, and can be called inside of a jitted function; shapes, `samples`,
    `max_new_tokens`, `top_k`, `eos`, `stop` and whether `temperature` is 0 are static. Each prompt
    is read once for all its samples, and the drawing stops as soon as all samples have ended. No
    gradient flows through it.

    Temperature applies first, then top-k, top-p and min-p.

    **Arguments:**

    - `policy`: a `Transformer`, with adapters or without, or any causal callable from ids of shape
        `(length,)` to logits of shape `(length, vocab)`. A `RecurrentPolicy` reads each new token
        by `extend`; any other callable runs on the whole row for each token.
    - `prompt`: the prompts, padded on the right. Shape `(prompts, length)`.
    - `samples`: the number of completions of each prompt.
    - `max_new_tokens`: the largest number of tokens in a completion, and the width of the result.
    - `temperature`: the logits are divided by it; 0 takes the likeliest token and needs no key.
    - `top_k`: draw from the `top_k` likeliest tokens (default: all).
    - `top_p`: draw from the fewest tokens whose probabilities sum to `top_p` (default: all).
    - `min_p`: draw from the tokens that are at least `min_p` times as likely as the likeliest one
        (default: all).
    - `key`: one random key, or one for each prompt. A sample depends on the key of its prompt and
        on its own number alone. So a larger `samples` adds samples and keeps the others, and with
        a key for each prompt every batch draws the same.
    - `eos`: the id of the token that ends a completion, or several ids.
    - `stop`: sequences of ids, each of which ends a completion.

    **Returns:**

    The new tokens, of shape `(prompts, samples, max_new_tokens)`, with a mask that is true up to
    and including the token that ended a completion. The log-probabilities are those of the policy
    at temperature 1, without top-k, top-p and min-p, as `score_pairs` computes them.

    **Raises:**

    `ValueError` if an argument is out of range, if a key is missing, if positions are learned and
    are fewer than the tokens of a prompt and its completion, or if the state of a `RecurrentPolicy`
    changes its shapes.
    """
    check_is_policy(policy)
    _check_prompt(prompt)
    is_greedy = isinstance(temperature, Real) and temperature == 0
    _check_counts(samples=samples, max_new_tokens=max_new_tokens, top_k=top_k)
    _check_range(temperature, top_p=top_p, min_p=min_p)
    if isinstance(policy, Transformer):
        policy.check_length(_longest(prompt) + int(max_new_tokens))
    # All tokens sum to 1, so nothing has to be looked for.
    top_p = None if isinstance(top_p, Real) and top_p == 1 else top_p
    return _sample(
        policy,
        Tokens(as_ids(prompt.ids), jnp.asarray(prompt.mask)),
        None if is_greedy else _keys(key, prompt.ids.shape[0]),
        jnp.asarray(temperature, jnp.float32),
        _as_array(top_p),
        _as_array(min_p),
        int(samples),
        int(max_new_tokens),
        None if top_k is None else int(top_k),
        _ends(eos, stop),
    )


def generate(
    policy: PyTree,
    prompt: Tokens,
    *,
    max_new_tokens: int | np.integer,
    temperature: Number = 1.0,
    top_k: int | np.integer | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    key: Keys | None = None,
    eos: Ids | None = None,
    stop: Sequence[Sequence[int]] | None = None,
) -> Tokens:
    """Draws one completion for each prompt: `sample` with `samples=1`.

    ```python
    answers = models.generate(policy, prompt, max_new_tokens=64, temperature=0, eos=2)
    ```

    **Arguments:**

    - all arguments: as in `sample`.

    **Returns:**

    Only the new tokens. The mask is true up to and including the token that ended a completion.
    Shape `(batch, max_new_tokens)`.

    **Raises:**

    `ValueError` as `sample` does.
    """
    samples = sample(
        policy,
        prompt,
        samples=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        key=key,
        eos=eos,
        stop=stop,
    )
    return jax.tree.map(lambda x: x[:, 0], samples.tokens)


@eqx.filter_jit
def _sample(
    policy: PyTree,
    prompt: Tokens,
    keys: Keys | None,
    temperature: Array,
    top_p: Array | None,
    min_p: Array | None,
    samples: int,
    steps: int,
    top_k: int | None,
    ends: Ends,
) -> Samples:
    def of_samples(key):
        return jax.vmap(lambda sample: jax.random.fold_in(key, sample))(jnp.arange(samples))

    keys = None if keys is None else jax.vmap(of_samples)(keys)

    def draw(logits, step):
        def one(logits, key):
            key = None if key is None else jax.random.fold_in(key, step)
            return choose(
                logits, key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            )

        return jax.vmap(jax.vmap(one))(logits, keys)

    # A loop that stops early has no gradient; without this, asking for one would be an error.
    policy = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, policy)
    return decode(policy, prompt, draw, samples=samples, steps=steps, ends=ends)


def _longest(prompt: Tokens) -> int:
    """The tokens of the longest prompt; under a transformation, the width, which bounds them."""
    if not is_concrete(prompt.mask) or not len(prompt.mask):
        return prompt.ids.shape[1]
    # NumPy: inside `jit` even a sum over a constant of JAX is traced.
    return int(np.asarray(prompt.mask).sum(axis=1).max())


def _keys(key: Keys | None, prompts: int) -> Keys:
    """One key for each prompt."""
    if key is None:
        raise ValueError("`key` is required to sample tokens; give one, or `temperature=0`.")
    return keys_per_row(key, prompts, rows="prompts")


def _ends(eos: Any, stop: Any) -> Ends:
    """The sequences of ids that end a completion."""
    several = () if eos is None else (eos,) if np.ndim(eos) == 0 else tuple(eos)
    try:
        ends = tuple((operator.index(end),) for end in several)
    except TypeError as error:
        raise ValueError(
            "`eos` must be the id of the token that ends a completion, or several ids; got "
            f"{eos!r}."
        ) from error
    try:
        stops = tuple(tuple(operator.index(id) for id in ids) for ids in stop or ())
        if () in stops:
            raise TypeError("empty")
    except TypeError as error:
        raise ValueError(
            "`stop` must be sequences of at least one id, such as `[[13, 13]]`; got "
            f"{stop!r}. A tokenizer turns text into ids."
        ) from error
    return ends + stops


def _as_array(number: Number | None) -> Array | None:
    # An array, so that another value does not compile another program.
    return None if number is None else jnp.asarray(number, jnp.float32)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, Tokens):
        raise ValueError(
            "`prompt` must be `dpx.Tokens(ids, mask)` of shape `(prompts, length)`; got "
            f"{described(prompt)}. A tokenizer turns text into `ids`; for one text, give "
            "`dpx.Tokens(np.array([ids]), np.ones((1, len(ids)), bool))`."
        )
    if prompt.ids.ndim != 2:
        raise ValueError(f"`prompt` must have shape `(prompts, length)`; got {prompt.ids.shape}.")


def _check_counts(**counts: int | np.integer | None) -> None:
    for name, count in counts.items():
        if count is not None and not count > 0:
            raise ValueError(f"`{name}` must be positive; got {count}.")


def _check_range(temperature: Any, **probabilities: Any) -> None:
    if isinstance(temperature, Real) and not float(temperature) >= 0:
        raise ValueError(f"`temperature` must not be negative; got {temperature}.")
    for name, value in probabilities.items():
        if isinstance(value, Real) and not 0 < float(value) <= 1:
            raise ValueError(f"`{name}` must be in (0, 1]; got {value}.")
