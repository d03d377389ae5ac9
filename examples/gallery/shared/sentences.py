"""A language small enough to enumerate: its sentences, policies over them, and exact quantities.

Losses, steps and samplers are not here; an entry takes those from the library. A sentence is known
by its number, its row in `Language.tokens`. Log-probabilities are in nats.
"""

import dataclasses
import itertools
from functools import cached_property

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import dpo_eqx as dpx

PerSentence = Float[Array, " sentences"]
Numbers = Int[Array | np.ndarray, " pairs"]


@dataclasses.dataclass(frozen=True)
class Language:
    """All sentences of up to `length` tokens, over words 0 to `words - 1` and an end token.

    A sentence stops at its end token, or when it has `length` words. So one token follows another
    until the sentence stops, and the probabilities of all sentences add up to 1 under any policy.
    The prompt of every sentence is one end token.
    """

    words: int = 4
    length: int = 4

    @property
    def end(self) -> int:
        """The id of the end token."""
        return self.words

    @property
    def vocab(self) -> int:
        """The number of ids: the words and the end token."""
        return self.words + 1

    @property
    def prefixes(self) -> int:
        """The number of beginnings that another token follows, the empty one included."""
        return sum(self.words**n for n in range(self.length))

    @cached_property
    def tokens(self) -> dpx.Tokens:
        """All sentences, short ones first. Shape `(sentences, length)`."""
        rows = [
            (*row, self.end) if count < self.length else row
            for count in range(self.length + 1)
            for row in itertools.product(range(self.words), repeat=count)
        ]
        lengths = np.array([len(row) for row in rows])
        padded = [row + (self.end,) * (self.length - len(row)) for row in rows]
        return dpx.Tokens(np.array(padded), np.arange(self.length) < lengths[:, None])

    @property
    def sentences(self) -> int:
        """The number of sentences."""
        return len(self.tokens.ids)

    def rows(self, numbers: Numbers) -> dpx.Tokens:
        """The tokens of the sentences with these numbers. Shape `(pairs, length)`."""
        return jax.tree.map(lambda x: jnp.asarray(x)[numbers], self.tokens)

    def prompt(self, pairs: int) -> dpx.Tokens:
        """The prompt of each pair. Shape `(pairs, 1)`."""
        return dpx.Tokens(jnp.full((pairs, 1), self.end), jnp.ones((pairs, 1), bool))

    def pairs(self, chosen: Numbers, rejected: Numbers, **fields) -> dpx.PreferenceBatch:
        """A batch from the numbers of sentences; `fields` are its further fields."""
        return dpx.PreferenceBatch(
            self.prompt(len(chosen)), self.rows(chosen), self.rows(rejected), **fields
        )

    def log_probs(self, policy: PyTree) -> PerSentence:
        """The log-probabilities of all sentences under a policy."""
        prompt, label = self.prompt(self.sentences), jnp.ones(self.sentences, bool)
        batch = dpx.UnpairedBatch(prompt, jax.tree.map(jnp.asarray, self.tokens), label)
        return jnp.asarray(dpx.score_unpaired(policy, batch).completion)


class Table(eqx.Module):
    """A policy with next-token logits of its own for each prefix: it can be any distribution."""

    logits: Float[Array, "prefixes vocab"]

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length vocab"]:
        words = self.logits.shape[1] - 1
        # Prefixes are numbered as the nodes of a tree: `token` leads from `n` to this child.
        prefixes = [jnp.zeros((), ids.dtype)]
        for token in ids[1:]:
            prefixes.append(words * prefixes[-1] + 1 + token)
        # Only positions behind the end of a sentence have a number out of range.
        return self.logits.at[jnp.stack(prefixes)].get(mode="clip")


class Chain(eqx.Module):
    """A policy whose next token depends on its position and on the last token.

    It has far fewer parameters than a `Table`, so it needs fewer pairs. If the reference is a
    chain and the reward is `random_reward`, the optimum is a chain, too.
    """

    logits: Float[Array, "length vocab vocab"]

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length vocab"]:
        # The last position predicts nothing if the row is the prompt and `length` tokens.
        return self.logits.at[jnp.arange(len(ids)), ids].get(mode="clip")

    @staticmethod
    def uniform(language: Language) -> "Chain":
        """The chain that draws the next token uniformly."""
        return Chain(jnp.zeros((language.length, language.vocab, language.vocab)))


class Network(eqx.Module):
    """A policy with one hidden layer on the one-hot prefix, so that prefixes share parameters."""

    embedding: eqx.nn.Linear
    unembedding_layer: eqx.nn.Linear
    length: int = eqx.field(static=True)
    vocab: int = eqx.field(static=True)

    def __init__(self, language: Language, width: int, *, key: PRNGKeyArray):
        inner, outer = jax.random.split(key)
        self.embedding = eqx.nn.Linear(language.length * language.vocab, width, key=inner)
        self.unembedding_layer = eqx.nn.Linear(width, language.vocab, key=outer)
        self.length, self.vocab = language.length, language.vocab

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length vocab"]:
        return jax.vmap(self.unembedding_layer)(self.states(ids))

    def states(self, ids: Int[Array, " length"]) -> Float[Array, "length width"]:
        """The hidden state that predicts the token after each of `ids`, the prompt first."""
        # The last position predicts nothing if the row is the prompt and `length` tokens.
        words = jax.nn.one_hot(ids[1 : self.length + 1], self.vocab)
        words = jnp.pad(words, ((0, self.length - len(words)), (0, 0)))
        is_read = jnp.tril(jnp.ones((len(ids), self.length), bool), k=-1)
        read = jnp.where(is_read[:, :, None], words[None], 0)
        return jnp.tanh(jax.vmap(self.embedding)(read.reshape(len(ids), -1)))


def bigrams(language: Language, key: PRNGKeyArray, scale: float = 1.0) -> Table:
    """A random grammar: the next token depends on the last one, with Gaussian logits."""
    logits = scale * jax.random.normal(key, (language.vocab, language.vocab))
    last = [language.end]
    for length in range(1, language.length):
        last += [row[-1] for row in itertools.product(range(language.words), repeat=length)]
    return Table(logits[np.array(last)])


def fit(policy: PyTree, language: Language, target: PerSentence, steps: int, rate: float) -> PyTree:
    """The policy after `steps` of Adam on its exact cross-entropy to `target`, log-probabilities.

    Supervised training on infinitely many sentences that `target` draws would do the same.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    params, static = eqx.partition(policy, eqx.is_inexact_array)

    def cross_entropy(params):
        return -(jnp.exp(target) * language.log_probs(eqx.combine(params, static))).sum()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params), state)
        return (optax.apply_updates(params, updates), state), None

    fitted, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return eqx.combine(fitted[0], static)


def random_task(language: Language, key: PRNGKeyArray) -> tuple[Chain, PerSentence]:
    """A reference, which is a chain fitted to a random grammar, and a random reward."""
    for_grammar, for_reward = jax.random.split(key)
    grammar = jax.jit(language.log_probs)(bigrams(language, for_grammar))
    fitted = jax.jit(lambda target: fit(Chain.uniform(language), language, target, 500, rate=0.2))
    return fitted(grammar), random_reward(language, for_reward)


def random_reward(language: Language, key: PRNGKeyArray) -> PerSentence:
    """A reward for words and for pairs of neighbours, of mean 0 and deviation 1 over sentences."""
    ids, mask = language.tokens.ids, language.tokens.mask
    for_words, for_neighbours = jax.random.split(key)
    word = jax.random.normal(for_words, (language.vocab,))[ids]
    pair = jax.random.normal(for_neighbours, (language.vocab,) * 2)[ids[:, :-1], ids[:, 1:]]
    reward = jnp.where(mask, word, 0).sum(1) + jnp.where(mask[:, 1:], pair, 0).sum(1)
    return (reward - reward.mean()) / reward.std()


def preferences(reward: PerSentence) -> Float[Array, "sentences sentences"]:
    """Bradley-Terry: the probability that the sentence of the row is preferred to the column's."""
    return jax.nn.sigmoid(reward[:, None] - reward[None, :])


def draw_pairs(
    key: PRNGKeyArray, writer: PerSentence, reward: PerSentence, pairs: int
) -> tuple[Int[Array, " pairs"], Int[Array, " pairs"]]:
    """Chosen and rejected: two sentences of a writer for each pair, with a Bradley-Terry label.

    `writer` holds log-probabilities. The two sentences of a pair may be the same.
    """
    for_sentences, for_labels = jax.random.split(key)
    first, second = jax.random.categorical(for_sentences, writer, shape=(2, pairs))
    is_first = jax.random.bernoulli(for_labels, jax.nn.sigmoid(reward[first] - reward[second]))
    return jnp.where(is_first, first, second), jnp.where(is_first, second, first)


def expectation(log_probs: PerSentence, values: PerSentence) -> Float[Array, ""]:
    """The mean of `values`, such as rewards, over the sentences of a policy."""
    # A sentence of probability 0 adds nothing, even if its value is infinite.
    return jnp.where(jnp.exp(log_probs) > 0, jnp.exp(log_probs) * values, 0).sum()


def kl(log_probs: PerSentence, log_reference: PerSentence) -> Float[Array, ""]:
    """KL of a policy to the reference, in nats."""
    return expectation(log_probs, log_probs - log_reference)


def optimum(log_reference: PerSentence, reward: PerSentence, beta) -> PerSentence:
    """`log(pi_ref exp(reward / beta) / Z)`: the policy of most reward minus `beta` times KL."""
    return jax.nn.log_softmax(log_reference + reward / beta)


def best_reward(
    log_reference: PerSentence, reward: PerSentence, at: Float[Array, " points"]
) -> Float[Array, " points"]:
    """The exact frontier: the most expected reward that a policy has at these KLs, in nats.

    The optimum's KL falls as its beta grows, so bisection finds the beta of each KL. Beyond the KL
    of the best sentence there is no more to gain: the frontier is flat.
    """

    def reward_at(wanted):
        def halve(bounds, _):
            low, high = bounds  # of log beta
            middle = (low + high) / 2
            is_too_far = kl(optimum(log_reference, reward, jnp.exp(middle)), log_reference) > wanted
            return (jnp.where(is_too_far, middle, low), jnp.where(is_too_far, high, middle)), None

        (low, _), _ = jax.lax.scan(halve, (jnp.log(1e-4), jnp.log(1e4)), length=60)
        return expectation(optimum(log_reference, reward, jnp.exp(low)), reward)

    return jax.vmap(reward_at)(at)
