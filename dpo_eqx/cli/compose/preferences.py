"""The preferences of a run: those to train on, and those held out, of the kind that its loss takes.

`data.py` reads one source.
"""

from ..settings.settings import Settings
from .data import Prepared, learned_positions, prepare, vocab_size
from .loss import Loss, is_unpaired, needs_reference


def prepare_all(settings: Settings, loss: Loss) -> list[Prepared]:
    """The training data and, if given, the held-out data."""
    vocab = vocab_size(settings.model)
    reference = settings.reference if needs_reference(loss) else None
    positions = learned_positions(settings.model, reference)
    paths = [settings.data, *([settings.eval_data] if settings.eval_data else [])]
    prepared = []
    for number, path in enumerate(paths):
        source = prepare(path, settings, vocab, positions=positions, held_out=number > 0)
        if source.form.unpaired != is_unpaired(loss):
            kind = "single completions" if is_unpaired(loss) else "pairs"
            raise ValueError(
                f"`--loss {' '.join(settings.loss)}` needs {kind}, and {path} holds "
                f"{source.form}. Give kto, bco or apo_zero_unpaired for single completions, any "
                "other loss for pairs."
            )
        prepared.append(source)
    return prepared
