"""`dpo-eqx train`, from the settings to the model on disk, in the order in which it happens.

Everything that can be wrong with the input is found before anything is written.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from ... import models, sharding
from ..._scoring.score import score_pairs, score_unpaired
from ..._training.evaluate import make_eval
from ..._training.step import make_step
from ..compose import policy as policies
from ..compose.data import Prepared, data_facts, make_batches, prepare, vocab_size
from ..compose.dtypes import (
    Dtypes,
    check_saved,
    choose_dtypes,
    dtypes_of,
    finished,
    keep_trained_wide,
    narrow_warning,
)
from ..compose.loss import Loss, compose_loss, is_unpaired, needs_reference
from ..compose.optimizer import compose_optimizer, compose_schedule, learning_rates
from ..report.probe import Probe, make_probe
from ..run import devices, hosts
from ..run.checkpoints import Checkpoints
from ..run.folder import Folder, facts_of
from ..run.hosts import say
from ..run.loop import Run, loop, make_advance
from ..run.sinks import no_sinks, open_sinks
from ..run.state import State, restored, to_save
from ..run.updates import UpdateWatch
from ..settings.check import check, check_hosts
from ..settings.settings import Settings
from ..terminal.display import display, no_display
from .report import try_report


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

    policy, reference, trainable, dtypes, finish = hosts.together(
        functools.partial(_load, settings, prepared[0], needs_reference(loss), mesh)
    )
    if settings.precompute_reference:
        reference, prepared = policies.precompute(
            reference, policy, prepared, settings, dtypes.compute, mesh
        )

    batches = make_batches(prepared[0], settings, training=True, share=devices.share(mesh))
    steps = total_steps(settings, batches.steps_per_epoch)
    schedule = compose_schedule(settings, steps)
    optimizer = compose_optimizer(settings, schedule)
    options = {
        "score": score_unpaired if is_unpaired(loss) else score_pairs,
        "compute_dtype": dtypes.compute,
        "reference_of": reference.view,
    }
    step = make_step(
        loss,
        optimizer,
        trainable=trainable,
        microbatches=settings.microbatches,
        update_fraction=True,
        **options,
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
        finish=finish,
    )
    say(_summary(run, state, reference.words, dtypes))
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


def _load(
    settings: Settings, prepared: Prepared, needs_reference: bool, mesh: Mesh | None
) -> tuple[PyTree, policies.Reference, PyTree, Dtypes, Callable[[PyTree], PyTree]]:
    """The policy in the dtypes of training, and what it is trained against.

    **Returns:**

    The policy, its reference, the filter of what is trained, the run's dtypes, and a function that
    makes the policy to be written of the one that was trained.
    """
    policy = policies.load_policy(settings, mesh)
    dtypes = choose_dtypes(settings)
    # Of the policy as it is stored: in half precision it takes half the memory.
    reference = policies.choose_reference(
        policy, settings, prepared, needed=needs_reference, mesh=mesh
    )
    trainable = policies.trainable_of(policy, settings)
    loaded = dtypes_of(eqx.filter(policy, trainable))
    finish = functools.partial(finished, saved=dtypes.saved, trainable=trainable, loaded=loaded)
    policy = keep_trained_wide(policy, trainable, settings)
    return policy, reference, trainable, dtypes, finish


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
        watch = _watch(run, state)
        with display(start, run.steps) if writes else no_display() as show:

            def write_and_show(step, numbers):
                write(step, numbers)
                show(step, numbers)
                watch.add(numbers)

            state, step = loop(
                run,
                state,
                start,
                write=write_and_show,
                write_evaluation=write_evaluation,
                stop=stop,
            )
        watch.close()
        run.checkpoints.close()
        if step < run.steps:
            say(f"stopped by {stop.signal} after step {step}; continue with --resume")
            return
        _write_model(run, state, folder)
        say(f"done: {folder.model}")
        probe(state, step, folder.after)
        if settings.report and writes:
            try_report(folder)


def _write_model(run: Run, state: State, folder: Folder) -> None:
    """Writes the adapters if there are any, and the model."""
    settings = run.settings
    if policies.has_adapters(settings):
        adapters = sharding.gather(eqx.filter(state.policy, run.trainable))
        _by_the_first(models.save_lora, adapters, folder.adapter, base=settings.model)
    trained = sharding.gather(run.finish(state.policy))
    _by_the_first(check_saved, trained, settings)
    _by_the_first(models.save, trained, folder.model, tokenizer_from=_tokenizer(settings))


def _by_the_first(write: Callable[..., None], *args: Any, **options: Any) -> None:
    """Lets the first process write; an error there is one on every process."""
    hosts.together(lambda: write(*args, **options) if hosts.is_first() else None)


def _watch(run: Run, state: State) -> UpdateWatch:
    """What warns if training moves too little; parameters in half precision it warns of at once."""
    params = eqx.filter(state.policy, run.trainable)
    warning = narrow_warning(params, run.settings)
    if warning is not None:
        hosts.warn(warning)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return UpdateWatch(
        float(run.rates.max()), " or ".join(sorted(kinds)), hosts.warn, narrow=bool(warning)
    )


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


def _summary(run: Run, state: State, reference: str, dtypes: Dtypes) -> str:
    params = eqx.filter(state.policy, run.trainable)
    kinds = " and ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}))
    return (
        f"{policies.parameters(state.policy):,} parameters, {policies.count(params):,} trained; "
        f"trained in {kinds}, {dtypes}\n"
        f"loss {' + '.join(run.settings.loss)}; reference: {reference}\n"
        f"{run.steps} steps of {run.settings.batch_size}; {run.batches.shapes()}"
    )
