"""`dpo-eqx train`, from the settings to the model on disk, in the order of execution.

It checks all of its input before it writes anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from ..._training.evaluate import make_eval
from ..._training.norms import parameter_group
from ..._training.step import make_step
from ..compose import policy as policies
from ..compose.data import Prepared, data_facts, make_batches
from ..compose.dtypes import (
    Dtypes,
    choose_dtypes,
    dtypes_of,
    finished,
    keep_trained_wide,
    narrow_warning,
)
from ..compose.loss import Loss, compose_loss, needs_reference
from ..compose.optimizer import compose_optimizer, compose_schedule, learning_rates
from ..compose.preferences import prepare_all
from ..compose.sample_prompts import SamplePrompts, sample_prompts
from ..compose.score import compose_score
from ..compose.tokenizer import template_in_file
from ..report.probe import Probe, make_probe
from ..run import devices, hosts
from ..run.best import Best
from ..run.checkpoints import Checkpoints
from ..run.compilation_cache import use_compilation_cache
from ..run.dry_run import NOTHING_DONE, needs
from ..run.evaluations import checked_goal, make_evaluate
from ..run.finish import choose, write_model
from ..run.folder import Folder, facts_of
from ..run.hosts import say
from ..run.inputs import check_same, digests_of
from ..run.late_metrics import NUM_TOKENS
from ..run.loop import Place, Run, is_over, loop, make_advance, restore
from ..run.out_of_memory import explained
from ..run.samples import make_samples
from ..run.sinks import Numbers, Samples, check_installed, no_sinks, open_sinks
from ..run.state import State, evaluated, offloaded
from ..run.updates import UpdateWatch
from ..settings.check import check, flag
from ..settings.check_hosts import check_hosts
from ..settings.settings import Settings
from ..settings.words import in_flags
from ..terminal.display import display, evaluation_line, no_display
from ..terminal.samples import sampled
from .report import try_report


def train(settings: Settings) -> None:
    """Trains a policy as the settings say.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    check_hosts(settings)
    use_compilation_cache(settings.compilation_cache)
    with hosts.connected(settings):
        _train(settings)


def _train(settings: Settings) -> None:
    folder = Folder(settings.output)
    # Loading a model takes long. Errors in settings and data are found before, on every process.
    loss, prepared, prompts, mesh = hosts.together(functools.partial(_prepare, settings, folder))
    # Read now, since the file may be gone or changed when the model is written.
    template = template_in_file(settings.chat_template)
    hosts.compare(settings, {"jax": jax.__version__} | data_facts(prepared))
    say(in_flags("\n".join(source.told for source in prepared)))

    policy, reference, trainable, dtypes, finish = hosts.together(
        functools.partial(load_all, settings, prepared[0], needs_reference(loss), mesh)
    )
    inputs = digests_of(settings, prepared)
    if settings.precompute_reference:
        reference, prepared = policies.precompute(
            reference, policy, prepared, settings, dtypes.compute, mesh
        )

    batches = make_batches(prepared[0], settings, training=True, **devices.parts(mesh))
    steps = total_steps(settings, batches.steps_per_epoch)
    schedule = compose_schedule(settings, steps)
    optimizer = compose_optimizer(settings, schedule)
    # Evaluations and the report must compute what the step computes, so all of them share these.
    score = compose_score(prepared[0].form, settings, packed=settings.pack)
    options = {"score": score, "compute_dtype": dtypes.compute, "reference_of": reference.view}
    group_of = parameter_group if settings.log_norms else None
    of_step = {"trainable": trainable, "microbatches": settings.microbatches, "group_of": group_of}
    step = make_step(loss, optimizer, update_fraction=True, **of_step, **options)
    evaluation = eqx.filter_jit(make_eval(loss, **options)), prepared[1:], settings, mesh
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    state = State(policy, opt_state, reference.policy, jax.random.key(settings.seed))
    offload = {"reference": settings.reference_offload, "optimizer": settings.optimizer_offload}
    # Placed like restored arrays, so that a resumed run executes the same program, bit for bit.
    state = offloaded(devices.put(state, mesh), **offload)
    run = Run(
        settings=settings,
        steps=steps,
        advance=make_advance(
            step, dropout=policies.draws_numbers(settings), mesh=mesh, offload=offload
        ),
        evaluate=make_evaluate(*evaluation),
        sample=make_samples(settings, prompts, options),
        batches=batches,
        checkpoints=Checkpoints(folder.checkpoints, settings.keep),
        trainable=trainable,
        rates=learning_rates(schedule, steps),
        restart=functools.partial(policies.starting_policy, settings, mesh, trainable),
        finish=finish,
        goal=hosts.together(lambda: checked_goal(*evaluation, state)),
        chat_template=template,
    )
    say(summary(run, state, reference.words, dtypes))
    if settings.dry_run:
        with batches, out_of_memory_explained(settings, state):
            widest = devices.put_batch(batches.widest(), mesh)
            say(str(needs(step, state, widest, mesh, trainable=trainable, options=options)))
        say(NOTHING_DONE)
        return
    # The report runs its few pairs in rows of their own.
    unpacked = options | {"score": compose_score(prepared[0].form, settings, packed=False)}
    probe = make_probe(settings, prepared, loss, unpacked, mesh)
    # A thread prepares the batches; leaving the context ends it, also after an error.
    with batches, out_of_memory_explained(settings, state):
        carry_out(run, state, folder, prepared[0], inputs, probe)


def out_of_memory_explained(settings: Settings, state: State) -> AbstractContextManager[None]:
    """A context in which a device that is out of memory is an error with the flags that help."""
    parts = {"policy": state.policy, "optimiser": state.opt_state, "reference": state.reference}
    is_whole = not policies.has_adapters(settings)
    helps = {
        "--microbatches": settings.microbatches < settings.batch_size,
        "--remat": not settings.remat,
        "--max-length": True,
        "--precompute-reference": state.reference is not None,
        "--reference-offload": state.reference is not None and not settings.reference_offload,
        "--optimizer-offload": not settings.optimizer_offload,
        "--lora-rank": is_whole,
        "--quantize": not is_whole and settings.quantize is None,
        "--mesh fsdp=N": jax.device_count() > 1,
    }
    # Other commands have only some of these flags.
    known = {flag(field.name) for field in dataclasses.fields(settings) if field.init}
    useful = [name for name, is_help in helps.items() if is_help]
    # A flag may have a value behind it.
    names = [f"`{name}`" for name in useful if f"`{name.split()[0]}`" in known]
    return explained(parts, f"These flags need less: {', '.join(names)}.")


def _prepare(
    settings: Settings, folder: Folder
) -> tuple[Loss, list[Prepared], SamplePrompts | None, Mesh | None]:
    """The loss, the data, the prompts to answer and the mesh, after all settings are checked."""
    check(settings)
    folder.check(settings)
    if hosts.is_first():
        check_installed(settings)
    loss = compose_loss(settings)
    prepared = prepare_all(settings, loss)
    return loss, prepared, sample_prompts(settings, prepared), devices.mesh_of(settings)


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    """The number of steps that `--steps` and `--epochs` allow, or that one epoch takes."""
    limits = [settings.steps] if settings.steps is not None else []
    epochs = 1 if settings.epochs is None and not limits else settings.epochs
    limits += [] if epochs is None else [epochs * steps_per_epoch]
    return min(limits)


def load_all(
    settings: Settings, prepared: Prepared, needs_reference: bool, mesh: Mesh | None
) -> tuple[PyTree, policies.Reference, PyTree, Dtypes, Callable[[PyTree], PyTree]]:
    """Loads the policy and its reference, in the dtypes of training.

    **Returns:**

    The policy, its reference, the filter of the trained parameters, the dtypes of the run, and a
    function from the trained policy to the policy that is saved.
    """
    policy = policies.load_policy(settings, mesh)
    dtypes = choose_dtypes(settings)
    # The reference is copied before the policy is widened: in half precision it takes half the
    # memory.
    reference = policies.choose_reference(
        policy, settings, prepared, needed=needs_reference, mesh=mesh
    )
    trainable = policies.trainable_of(policy, settings)
    loaded = dtypes_of(eqx.filter(policy, trainable))
    finish = functools.partial(finished, saved=dtypes.saved, trainable=trainable, loaded=loaded)
    policy = keep_trained_wide(policy, trainable, settings)
    return policy, reference, trainable, dtypes, finish


def carry_out(
    run: Run,
    state: State,
    folder: Folder,
    prepared: Prepared,
    inputs: Mapping[str, str | None],
    probe: Probe,
) -> None:
    """Trains from the last complete checkpoint to the end, and writes the model."""
    settings = run.settings
    start = run.checkpoints.latest() or 0
    place = Place(state, start, Best())
    facts = facts_of(prepared, run.batches.shapes(), inputs)
    if start:
        # `begin` replaces the facts of the earlier start, so the inputs are compared before.
        check_same(folder.inputs(), inputs, folder.path)
        place = restore(run, state, start)
        say(f"continued after step {start}")
    hosts.on_first(folder.begin, settings, facts, start)
    if not start:
        probe(evaluated(place.state), start, folder.before)
    if NUM_TOKENS in settings.metrics:
        run = dataclasses.replace(run, tokens_before=folder.number_at(start, NUM_TOKENS))
    # All processes take every step, but only the first writes and shows something.
    is_writer = hosts.is_first()
    sinks = open_sinks(settings, folder, start) if is_writer else no_sinks()
    with hosts.stop_signals() as stop, sinks as (write, write_evaluation, write_samples):
        watch = _watch(run, place.state)
        with display(start, run.steps) if is_writer else no_display() as show:

            def write_and_show(step: int, numbers: Numbers) -> None:
                write(step, numbers)
                show(step, numbers)
                watch.add(numbers)

            def write_and_tell(step: int, name: str, numbers: Numbers) -> None:
                write_evaluation(step, numbers)
                say(evaluation_line(step, name, numbers))

            def write_and_tell_samples(step: int, samples: Samples) -> None:
                write_samples(step, samples)
                say(sampled(step, samples))

            place = loop(
                run,
                place,
                write=write_and_show,
                write_evaluation=write_and_tell,
                write_samples=write_and_tell_samples,
                stop=stop,
            )
        watch.close()
        if not is_over(run, place.step, place.best):
            run.checkpoints.close()
            say(f"stopped by {stop.signal} after step {place.step}; continue with --resume")
            return
        # Signals are still caught: the first one from here on does not interrupt the writing.
        place = choose(run, place, folder)
        run.checkpoints.close()
        write_model(run, place.state, folder)
        say(f"done: {folder.model}")
        probe(evaluated(place.state), place.step, folder.after)
        if settings.report and is_writer:
            try_report(folder)


def _watch(run: Run, state: State) -> UpdateWatch:
    """A watch over the size of updates; it warns at once if parameters have half precision."""
    params = eqx.filter(state.policy, run.trainable)
    warn = functools.partial(hosts.warn, run.settings.command)
    warning = narrow_warning(params, run.settings)
    if warning is not None:
        warn(warning)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return UpdateWatch(
        float(run.rates.max()), " or ".join(sorted(kinds)), warn, narrow=bool(warning)
    )


def summary(run: Run, state: State, reference: str, dtypes: Dtypes) -> str:
    """The lines that describe the run before its first step."""
    params = eqx.filter(state.policy, run.trainable)
    about = "about " * run.settings.pack
    kinds = " and ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}))
    return (
        f"{policies.parameters(state.policy):,} parameters, {policies.count(params):,} trained; "
        f"trained in {kinds}, {dtypes}\n"
        f"loss {' + '.join(run.settings.loss)}; reference: {reference}\n"
        f"{run.steps} steps of {about}{run.settings.batch_size}; {run.batches.shapes()}"
    )
