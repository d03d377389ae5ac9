"""Answers to a few prompts while a run learns, beside those of the reference.

`compose/sample_prompts.py` chooses the prompts, and `loop.py` decides when.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ... import models, sharding
from ..._arrays.tokens import Tokens
from ..._jax.dtypes import in_dtype
from ..._jax.inference_mode import in_inference
from ..compose.draws import answers_of
from ..compose.sample_prompts import SamplePrompts
from ..settings.settings import Settings
from ..terminal.answers import ends_of, padded, width_of
from ..terminal.prompts import shown
from .state import State

Drawn = list[dict[str, Any]]
Answers = list[tuple[str, bool]]


def make_samples(
    settings: Settings, prompts: SamplePrompts | None, options: Mapping[str, Any]
) -> Callable[[State], Drawn] | None:
    """A function from a state to the answers to all prompts; `None` without prompts.

    It returns a dictionary for each prompt: `prompt`, `answer`, `ended` (whether the answer ended
    by itself), and the same of the reference as `reference` and `reference_ended`, `None` if the
    run has no reference in memory. Every call uses the same random numbers, which are not those of
    the training. Several processes must all call it.

    **Arguments:**

    - `options`: the options of `make_step`; the dtype of the forward pass and the reference count.
    """
    if prompts is None:
        return None
    draw = _make_draw(settings, prompts, options["compute_dtype"])
    view = options["reference_of"]
    fixed: list[Answers] = []  # the answers of a reference that does not move

    def reference_answers(state: State) -> Answers:
        if fixed:
            return fixed[0]
        reference = state.reference if view is None else view(state.policy)
        if reference is None:
            return []
        answers = draw(reference)
        if not settings.sync_reference_every:
            fixed.append(answers)
        return answers

    def samples(state: State) -> Drawn:
        return list(_joined(prompts, draw(state.policy), reference_answers(state)))

    return samples


def _make_draw(
    settings: Settings, prompts: SamplePrompts, compute_dtype: Any
) -> Callable[[models.Transformer], Answers]:
    """A function from a policy to its answers to all prompts, in their order."""
    encoded, tokenizer = prompts.encoded, prompts.tokenizer
    rows = padded(encoded.ids, width_of(encoded.ids))

    @eqx.filter_jit
    def tokens_of(policy: PyTree, ends: tuple[int, ...]) -> Tokens:
        # As an evaluation runs it: without dropout, and in the dtype of the forward pass.
        policy = in_dtype(in_inference(policy), compute_dtype)
        drawn = models.sample(
            policy,
            rows,
            samples=1,
            max_new_tokens=settings.sample_tokens,
            key=jax.random.key(settings.seed),
            eos=ends,
        )
        return drawn.tokens

    def draw(policy: models.Transformer) -> Answers:
        ends = ends_of(policy, tokenizer)
        tokens = sharding.gather(tokens_of(policy, ends))
        answers: Answers = []
        for number in range(len(encoded.ids)):
            own = jax.tree.map(lambda x, number=number: np.asarray(x[number]), tokens)
            _, (text,), (is_ended,) = answers_of(encoded, number, own, tokenizer, ends)
            answers.append((text, is_ended))
        return answers

    return draw


def _joined(
    prompts: SamplePrompts, answers: Answers, references: Answers
) -> Iterator[dict[str, Any]]:
    for number, (text, is_ended) in enumerate(answers):
        reference, reference_ended = references[number] if references else (None, None)
        yield {
            "prompt": shown(prompts.tokenizer, prompts.encoded.prompts[number]),
            "answer": text,
            "ended": is_ended,
            "reference": reference,
            "reference_ended": reference_ended,
        }
