"""The end of a run: which of its states is the model, and the files of it.

`loop.py` takes the steps before, and the report is in `cli/report/`.
"""

import dataclasses

from ... import models, sharding
from ..compose import policy as policies
from ..compose.dtypes import check_saved
from ..settings.settings import Settings
from . import hosts
from .best import in_words, why_early
from .folder import Folder
from .hosts import say
from .loop import Place, Run, best_place
from .state import State, averaged


def choose(run: Run, place: Place, folder: Folder) -> Place:
    """The place whose model is written: the last one, or the best by `--keep-best`."""
    if run.goal is None:
        return place
    if place.step < run.steps:
        say(why_early(place.best, run.goal, place.step))
    chosen = best_place(run, place)
    say(f"{folder.model} is {in_words(place.best, run.goal)}")
    facts = dataclasses.asdict(place.best) | run.goal._asdict()
    facts |= {"last_step": place.step, "stopped_early": place.step < run.steps}
    hosts.on_first(folder.note, {"best": facts})
    return chosen


def write_model(run: Run, state: State, folder: Folder) -> None:
    """Writes the model, and the adapters if they were trained."""
    settings, policy = run.settings, averaged(state)
    # Every process must gather, since that is an all-gather of shards; the first one writes.
    if policies.has_adapters(settings):
        adapters = sharding.gather(policies.adapters_alone(policy, run.trainable))
        hosts.on_first(models.save_lora, adapters, folder.adapter, base=settings.model)
    trained = sharding.gather(run.finish(policy))
    hosts.on_first(check_saved, trained, settings)
    companions = {"tokenizer_from": _tokenizer(settings), "chat_template": run.chat_template}
    hosts.on_first(models.save, trained, folder.model, **companions)


def _tokenizer(settings: Settings) -> str | None:
    """The source of the tokenizer to save with the model; `None` for the model's own."""
    return None if settings.tokenizer == "bytes" else settings.tokenizer
