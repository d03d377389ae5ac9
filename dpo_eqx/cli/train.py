"""`dpo-eqx train`, from the settings to the model on disk, in the order in which it happens.

Everything that can be wrong with the input is found before anything is written.
"""

import functools
import operator
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh

from .. import models, sharding
from ..evaluate import make_eval
from ..score import score_pairs, score_unpaired
from ..step import make_step
from . import devices, hosts, policies
from .check import check, check_hosts
from .checkpoints import Checkpoints
from .compose import Loss, compose_loss, is_unpaired, needs_reference
from .display import display, no_display
from .folder import Folder, facts_of
from .hosts import say
from .loop import Run, loop, make_advance
from .optimizers import compose_optimizer, compose_schedule, learning_rates
from .report import try_report
from .report_probe import Probe, make_probe
from .rows import Prepared, data_facts, make_batches, prepare, vocab_size
from .settings import Settings
from .sinks import no_sinks, open_sinks
from .state import State, restored, to_save


def train(settings: Settings) -> None:
    """Trains a policy as the settings say.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for whoever gave the settings.
    """
    check_hosts(settings)
    with hosts.connected(settings):
        _train(settings)


def _train(settings: Settings) -> None:
    folder = Folder(settings.output)

    def prepare() -> tuple[Loss, list[Prepared], Mesh | None]:
        check(settings)
        folder.check(settings)
        loss = compose_loss(settings)
        return loss, _prepare_all(settings, loss), devices.mesh_of(settings)

    loss, prepared, mesh = hosts.together(prepare)
    hosts.compare(settings, {"jax": jax.__version__} | data_facts(prepared))
    say("\n".join(str(each.report) for each in prepared))

    policy = hosts.together(functools.partial(policies.load_policy, settings, mesh))
    needed = needs_reference(loss)
    reference = hosts.together(
        functools.partial(
            policies.choose_reference, policy, settings, prepared[0], needed=needed, mesh=mesh
        )
    )
    if settings.precompute_reference:
        reference, prepared = policies.precompute(reference, policy, prepared, settings, mesh)

    batches = make_batches(prepared[0], settings, training=True, share=devices.share(mesh))
    steps = total_steps(settings, batches.steps_per_epoch)
    schedule = compose_schedule(settings, steps)
    optimizer = compose_optimizer(settings, schedule)
    trainable = policies.trainable_of(policy, settings)
    options = {
        "score": score_unpaired if is_unpaired(loss) else score_pairs,
        "compute_dtype": policies.dtype_of(settings.compute_dtype),
        "reference_of": reference.view,
    }
    step = make_step(
        loss, optimizer, trainable=trainable, microbatches=settings.microbatches, **options
    )
    evaluate = eqx.filter_jit(make_eval(loss, **options))
    held_out = prepared[1] if len(prepared) > 1 else None

    opt_state = optimizer.init(eqx.filter(policy, trainable))
    state = State(policy, opt_state, reference.policy, jax.random.key(settings.seed))
    state = devices.put(state, mesh)
    run = Run(
        settings=settings,
        steps=steps,
        advance=make_advance(step, dropout=settings.dropout, mesh=mesh),
        evaluate=held_out and functools.partial(evaluate_all, evaluate, held_out, settings, mesh),
        batches=batches,
        checkpoints=Checkpoints(folder.checkpoints, settings.keep),
        trainable=trainable,
        rates=learning_rates(schedule, steps),
    )
    say(_summary(run, state, reference.words))
    probe = make_probe(settings, prepared, loss, options, mesh)
    with batches:
        _carry_out(run, state, folder, prepared[0], probe)


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    """The number of steps: what `--steps` and `--epochs` allow, or else one epoch."""
    limits = [settings.steps] if settings.steps is not None else []
    epochs = 1 if settings.epochs is None and not limits else settings.epochs
    limits += [] if epochs is None else [epochs * steps_per_epoch]
    return min(limits)


def evaluate_all(
    evaluate: Any, held_out: Prepared, settings: Settings, mesh: Mesh | None, state: State
) -> dict[str, float]:
    """The metrics on the held-out data, exact means over all of it."""
    with make_batches(held_out, settings, training=False, share=devices.share(mesh)) as batches:
        placed = (devices.put_batch(batch, mesh) for batch in batches)
        parts = (evaluate(state.policy, batch, state.reference) for batch in placed)
        metrics = functools.reduce(operator.add, parts)
    return {f"eval/{name}": float(value) for name, value in metrics.mean().items()}


def _prepare_all(settings: Settings, loss: Loss) -> list[Prepared]:
    """The training data and, if given, the held-out data."""
    vocab = vocab_size(settings.model)
    paths = [settings.data, *([settings.eval_data] if settings.eval_data else [])]
    prepared = []
    for path in paths:
        each = prepare(path, settings, vocab)
        if each.form.unpaired != is_unpaired(loss):
            kind = "single completions" if is_unpaired(loss) else "pairs"
            raise ValueError(
                f"`--loss {' '.join(settings.loss)}` needs {kind}, and {path} holds "
                f"{each.form}. Take kto, bco or apo_zero_unpaired for single completions, any "
                "other loss for pairs."
            )
        prepared.append(each)
    return prepared


def _carry_out(run: Run, state: State, folder: Folder, prepared: Prepared, probe: Probe) -> None:
    """Goes on where the last complete checkpoint is, and writes the model at the end."""
    settings = run.settings
    start = run.checkpoints.latest() or 0
    facts = facts_of(prepared, run.batches.shapes())
    if start:
        _check_data(folder, prepared)
        like = to_save(state, run.trainable, moving_reference=settings.sync_reference_every > 0)
        saved, position = run.checkpoints.restore(start, like)
        state = restored(state, saved)
        run.batches.set_state(position)
        say(f"continued after step {start}")
    writes = hosts.is_first()
    hosts.together(lambda: folder.begin(settings, facts, start) if writes else None)
    if not start:
        probe(state, start, folder.before)
    with (
        hosts.stop_signals() as stop,
        open_sinks(settings, folder, start) if writes else no_sinks() as (write, write_evaluation),
    ):
        with display(start, run.steps) if writes else no_display() as show:

            def write_and_show(step, numbers):
                write(step, numbers)
                show(step, numbers)

            state, step = loop(
                run,
                state,
                start,
                write=write_and_show,
                write_evaluation=write_evaluation,
                stop=stop,
            )
        run.checkpoints.close()
        if step < run.steps:
            say(f"stopped by {stop.signal} after step {step}; continue with --resume")
            return
        if policies.has_adapters(settings):
            adapters = sharding.gather(eqx.filter(state.policy, run.trainable))
            write_adapter = functools.partial(
                models.save_lora, adapters, folder.adapter, base=settings.model
            )
            hosts.together(lambda: write_adapter() if writes else None)
        trained = sharding.gather(models.merge_lora(state.policy))
        write_model = functools.partial(
            models.save, trained, folder.model, tokenizer_from=_tokenizer(settings)
        )
        hosts.together(lambda: write_model() if writes else None)
        say(f"done: {folder.model}")
        probe(state, step, folder.after)
        if settings.report and writes:
            try_report(folder)


def _tokenizer(settings: Settings) -> str | None:
    """The folder whose tokenizer belongs to the model, where it is not the model's own."""
    return None if settings.tokenizer == "bytes" else settings.tokenizer


def _check_data(folder: Folder, prepared: Prepared) -> None:
    then = folder.fingerprint()
    if then is not None and then != prepared.fingerprint:
        raise ValueError(
            f"`--data` must hold what it held when the run in {folder.path} began; its content has "
            "changed since. Give the same file, or another `--output`."
        )


def _summary(run: Run, state: State, reference: str) -> str:
    trained = policies.count(eqx.filter(state.policy, run.trainable))
    return (
        f"{policies.parameters(state.policy):,} parameters, {trained:,} trained; "
        f"loss {' + '.join(run.settings.loss)}; reference: {reference}\n"
        f"{run.steps} steps of {run.settings.batch_size}; {run.batches.shapes()}"
    )
