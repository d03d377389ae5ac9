"""`dpo-eqx online`: rounds of drawing, judging, pairing and a training step, in the order of a run.

It is `train` with another source of pairs: the loop, the checkpoints and the folder are the same.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh

from ... import data
from ..._training.norms import parameter_group
from ..._training.step import make_step
from ...data._fingerprint import digest
from ...data._records.records import Form
from ..compose import draws, policy as policies
from ..compose.data import (
    Prepared,
    data_facts,
    learned_positions,
    make_batches,
    vocab_size,
)
from ..compose.functions import load_function
from ..compose.loss import Loss, compose_loss, needs_reference, takes_offset, takes_rows
from ..compose.optimizer import compose_optimizer, compose_schedule, learning_rates
from ..compose.rewards import (
    Judge,
    function_judge,
    model_judge,
)
from ..compose.sample_prompts import SamplePrompts, sample_prompts_among
from ..compose.score import compose_score
from ..compose.tokenizer import template_in_file, tokenizer_of
from ..compose.vocabulary import check_one_vocabulary
from ..report.probe import make_sample_probe
from ..run import devices, hosts, rounds
from ..run.checkpoints import Checkpoints
from ..run.compilation_cache import use_compilation_cache
from ..run.dry_run import NOTHING_DONE, needs
from ..run.folder import Folder
from ..run.hosts import say
from ..run.inputs import digest_reward, digests_of
from ..run.loop import Run, make_advance
from ..run.samples import make_samples
from ..run.sinks import check_installed
from ..run.state import State, offloaded
from ..settings.check import check
from ..settings.check_hosts import check_hosts
from ..settings.online import Online, check_online
from ..settings.options import is_function, split_pairs
from ..settings.parse import parse
from ..settings.shared_flags import in_shared_names
from ..terminal.answers import ends_of
from ..terminal.prompts import Reading, read_prompts, stored
from .train import carry_out, load_all, out_of_memory_explained, summary, total_steps


def online(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    settings = parse(in_shared_names(arguments), Online, "dpo-eqx online")
    check_hosts(settings)
    use_compilation_cache(settings.compilation_cache)
    with hosts.connected(settings):
        _online(settings)


def _online(settings: Online) -> None:
    folder = Folder(settings.output)
    # Loading a model takes long. Errors in settings and data are found before, on every process.
    loss, mesh, tokenizer, encoded, shown = hosts.together(
        functools.partial(_prepare, settings, folder)
    )
    template = template_in_file(settings.chat_template)
    prepared = _prepared(settings, encoded, tokenizer)
    say(prepared.told)
    judge, of_reward = hosts.together(functools.partial(_reward, settings))
    facts = {"jax": jax.__version__, "the reward": of_reward}
    hosts.compare(settings, facts | data_facts([prepared]))

    policy, reference, trainable, dtypes, finish = hosts.together(
        functools.partial(load_all, settings, prepared, needs_reference(loss), mesh)
    )
    inputs = digests_of(settings, [prepared]) | {"--reward": of_reward}
    batches = make_batches(prepared, settings, training=True, **devices.parts(mesh))
    steps = total_steps(settings, batches.steps_per_epoch)
    schedule = compose_schedule(settings, steps)
    optimizer = compose_optimizer(settings, schedule)
    of_models = {"compute_dtype": dtypes.compute, "reference_of": reference.view}
    # The rows are prompts, and a round makes pairs of token ids of them.
    score = compose_score(Form("token ids"), settings, packed=False)
    options = {"score": score, **of_models}
    group_of = parameter_group if settings.log_norms else None
    of_step = {"trainable": trainable, "microbatches": settings.microbatches, "group_of": group_of}
    step = make_step(loss, optimizer, update_fraction=True, **of_step, **options)
    offload = {"reference": settings.reference_offload, "optimizer": settings.optimizer_offload}
    ends = ends_of(policy, tokenizer)
    draw = rounds.make_draw(settings, ends=ends, needs_reference=needs_reference(loss), **of_models)
    pair = rounds.make_pair(settings, offset=_needs_offset(settings), mesh=mesh)
    one_round = rounds.make_round(
        make_advance(step, dropout=policies.draws_numbers(settings), offload=offload),
        draw,
        pair,
        rounds.Judging(encoded, tokenizer, ends, judge),
        mesh,
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    state = State(policy, opt_state, reference.policy, jax.random.key(settings.seed))
    state = offloaded(devices.put(state, mesh), **offload)
    run = Run(
        settings=settings,
        steps=steps,
        advance=one_round,
        evaluate=None,
        sample=make_samples(settings, shown, options),
        batches=batches,
        checkpoints=Checkpoints(folder.checkpoints, settings.keep),
        trainable=trainable,
        rates=learning_rates(schedule, steps),
        restart=functools.partial(policies.starting_policy, settings, mesh, trainable),
        finish=finish,
        chat_template=template,
    )
    say(summary(run, state, reference.words, dtypes))
    if settings.dry_run:
        with batches, out_of_memory_explained(settings, state):
            pairs = rounds.pair_shapes(draw, pair, state, batches.widest(), mesh)
            say(_about_a_round(settings, pairs.pairs))
            say(str(needs(step, state, pairs, mesh, trainable=trainable, options=options)))
        say(NOTHING_DONE)
        return
    probe = make_sample_probe(settings, prepared, tokenizer, dtypes.compute)
    with batches, out_of_memory_explained(settings, state):
        carry_out(run, state, folder, prepared, inputs, probe)


def _prepare(
    settings: Online, folder: Folder
) -> tuple[Loss, Mesh | None, Any, draws.Encoded, SamplePrompts | None]:
    """The loss, mesh, tokenizer, prompts and prompts to show, after all settings are checked."""
    check(settings)
    check_online(settings)
    mesh = devices.mesh_of(settings)
    folder.check(settings)
    if hosts.is_first():
        check_installed(settings)
    loss, tokenizer = _loss(settings), tokenizer_of(settings)
    encoded = _encode(settings, tokenizer)
    shown = sample_prompts_among(settings, encoded.prompts, tokenizer)
    return loss, mesh, tokenizer, encoded, shown


def _about_a_round(settings: Online, pairs: int) -> str:
    return (
        f"a round draws {settings.samples} answers of at most {settings.max_new_tokens} tokens to "
        f"each of {settings.batch_size} prompts, has them judged by {settings.reward}, and trains "
        f"on at most {pairs} pairs; this training step needs:"
    )


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
    # Each process judges the answers to its part of the prompts.
    most = math.ceil(settings.batch_size / jax.process_count()) * settings.samples
    if not is_function(settings.reward):
        judge = model_judge(
            settings.reward,
            chat_template=settings.reward_template,
            template_flag="--reward-template",
            dtype=None,
            most=most,
        )
        return judge, digest_reward(settings.reward, None)
    function = load_function(settings.reward, "--reward")
    judge = function_judge(function, most=most, timeout=settings.reward_timeout)
    return judge, digest_reward(settings.reward, function)
