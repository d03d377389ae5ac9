"""`dpo-eqx online`: rounds of drawing, judging, pairing and a training step, in the order of a run.

It is `train` with another source of pairs: the loop, the checkpoints and the folder are the same.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from ... import data
from ..._scoring.score import score_pairs
from ..._training.norms import parameter_group
from ..._training.step import make_step
from ...data._fingerprint import digest
from ...data._records.records import Form
from ..compose import draws, policy as policies
from ..compose.data import Prepared, learned_positions, make_batches, vocab_size
from ..compose.functions import load_function
from ..compose.loss import Loss, compose_loss, needs_reference, takes_offset, takes_rows
from ..compose.optimizer import compose_optimizer, compose_schedule, learning_rates
from ..compose.rewards import (
    Judge,
    function_judge,
    model_judge,
)
from ..compose.tokenizer import template_in_file, tokenizer_of
from ..compose.vocabulary import check_one_vocabulary
from ..report.probe import make_sample_probe
from ..run import devices, rounds
from ..run.checkpoints import Checkpoints
from ..run.compilation_cache import use_compilation_cache
from ..run.folder import Folder
from ..run.inputs import digest_reward, digests_of
from ..run.loop import Run, make_advance
from ..run.sinks import check_installed
from ..run.state import State
from ..settings.check import check
from ..settings.online import Online, check_online
from ..settings.options import is_function, split_pairs
from ..settings.parse import parse
from ..settings.shared_flags import in_shared_names
from ..terminal.answers import ends_of
from ..terminal.display import say
from ..terminal.prompts import Reading, read_prompts, stored
from .train import carry_out, load_all, out_of_memory_explained, summary, total_steps


def online(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    settings = parse(in_shared_names(arguments), Online, "dpo-eqx online")
    use_compilation_cache(settings.compilation_cache)
    folder = Folder(settings.output)
    check(settings)
    check_online(settings)
    mesh = devices.mesh_of(settings)
    folder.check(settings)
    check_installed(settings)
    loss = _loss(settings)
    template, tokenizer = template_in_file(settings.chat_template), tokenizer_of(settings)
    encoded = _encode(settings, tokenizer)
    prepared = _prepared(settings, encoded, tokenizer)
    say(prepared.told)
    judge, of_reward = _reward(settings)

    policy, reference, trainable, dtypes, finish = load_all(
        settings, prepared, needs_reference(loss), mesh
    )
    inputs = digests_of(settings, [prepared]) | {"--reward": of_reward}
    batches = make_batches(prepared, settings, training=True, **devices.parts(mesh))
    steps = total_steps(settings, batches.steps_per_epoch)
    schedule = compose_schedule(settings, steps)
    optimizer = compose_optimizer(settings, schedule)
    options = {"compute_dtype": dtypes.compute, "reference_of": reference.view}
    step = make_step(
        loss,
        optimizer,
        score=score_pairs,
        trainable=trainable,
        microbatches=settings.microbatches,
        update_fraction=True,
        group_of=parameter_group if settings.log_norms else None,
        **options,
    )
    ends = ends_of(policy, tokenizer)
    one_round = rounds.make_round(
        make_advance(step, dropout=policies.draws_numbers(settings), mesh=mesh),
        rounds.make_draw(settings, ends=ends, needs_reference=needs_reference(loss), **options),
        rounds.make_pair(settings, offset=_needs_offset(settings)),
        rounds.Judging(encoded, tokenizer, ends, judge),
        mesh,
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    state = State(policy, opt_state, reference.policy, jax.random.key(settings.seed))
    state = devices.put(state, mesh)
    run = Run(
        settings=settings,
        steps=steps,
        advance=one_round,
        evaluate=None,
        sample=None,
        batches=batches,
        checkpoints=Checkpoints(folder.checkpoints, settings.keep),
        trainable=trainable,
        rates=learning_rates(schedule, steps),
        restart=functools.partial(policies.starting_policy, settings, mesh, trainable),
        finish=finish,
        chat_template=template,
    )
    say(summary(run, state, reference.words, dtypes))
    probe = make_sample_probe(settings, prepared, tokenizer, dtypes.compute)
    with batches, out_of_memory_explained(settings, state):
        carry_out(run, state, folder, prepared, inputs, probe)


def _loss(settings: Online) -> Loss:
    loss = compose_loss(settings)
    if not takes_rows(loss, unpaired=False):
        raise ValueError(
            f"`--loss {' '.join(settings.loss)}` needs single completions, and a round makes "
            "pairs. Give a loss of pairs, such as sigmoid, ipo, hinge or sppo_hard."
        )
    return loss


def _needs_offset(settings: Online) -> bool:
    """Whether the difference of the rewards is the offset of the loss."""
    given = split_pairs(settings.loss_options, "--loss-options")
    return takes_offset(settings) and "offset" not in given


def _encode(settings: Online, tokenizer: Any) -> draws.Encoded:
    check_one_vocabulary(settings.model, settings.reference, "--reference")
    encoded = draws.encode(
        read_prompts(settings.prompts, None, Reading.of(settings)),
        tokenizer,
        as_turns=settings.as_chat,
        max_prompt_length=settings.max_prompt_length,
    )
    positions = learned_positions(settings.model, settings.reference)
    draws.check_fits(encoded, positions, settings.max_new_tokens, vocab_size(settings.model))
    return encoded


def _prepared(settings: Online, encoded: draws.Encoded, tokenizer: Any) -> Prepared:
    """The prompts as rows for `data.batches`: the completion of a row is the prompt's number."""
    rows = [
        {"prompt_ids": ids, "completion_ids": [number], "label": True}
        for number, ids in enumerate(encoded.ids)
    ]
    values = [stored(tokenizer, prompt) for prompt in encoded.prompts]
    tokens = sum(map(len, encoded.ids))
    counts = {"prompt_cut": encoded.cut} if encoded.cut else {}
    told = f"{settings.prompts}: {len(rows)} prompts; {tokens} tokens"
    if encoded.cut:
        told += f"; {encoded.cut} lost their start (`--max-prompt-length`)"
    return Prepared(
        rows,
        data.Report(form="prompts", read=len(rows), kept=len(rows), tokens=tokens, counts=counts),
        Form("unpaired token ids"),
        digest(values),
        mismatched=False,
        told=told,
    )


def _reward(settings: Online) -> tuple[Judge, str]:
    """The reward, and a digest of it."""
    most = settings.batch_size * settings.samples
    if not is_function(settings.reward):
        judge = model_judge(
            settings.reward, chat_template=settings.reward_template, dtype=None, most=most
        )
        return judge, digest_reward(settings.reward, None)
    function = load_function(settings.reward, "--reward")
    judge = function_judge(function, most=most, timeout=settings.reward_timeout)
    return judge, digest_reward(settings.reward, function)
