"""The usual names of the losses, as in TRL's `loss_type`."""

import difflib
from collections.abc import Callable
from typing import Any

from ._adaptive import beta_dpo
from ._anchored import apo_down, apo_zero, bco_pair, cal_dpo, nca, sppo
from ._combinators import length_normalized
from ._difference import discopop, exo, hinge, ipo
from ._dpo import dpo, robust_dpo
from ._likelihood import alpha_po, cpo, orpo, sft, simpo
from ._margins import chi_po, dpop, odpo, r_dpo
from ._transport import aot, aot_unpaired
from ._unpaired import apo_zero_unpaired, bco, kto


class Names(dict[str, Callable[..., Any]]):
    """A dictionary that raises `ValueError` for an unknown name, and suggests a known one."""

    def __missing__(self, name: str) -> Callable[..., Any]:
        matches = difflib.get_close_matches(str(name), self, n=1, cutoff=0.4)
        hint = f" Did you mean {matches[0]!r}?" if matches else ""
        known = ", ".join(repr(known) for known in sorted(self))
        raise ValueError(f"`loss` must be one of {known}; got {name!r}.{hint}")


BY_NAME = Names(
    {
        "sigmoid": dpo,
        "sigmoid_norm": length_normalized(dpo),
        "robust": robust_dpo,
        "hinge": hinge,
        "ipo": length_normalized(ipo),
        "exo_pair": exo,
        "nca_pair": nca,
        "bco_pair": bco_pair,
        "sppo_hard": sppo,
        "aot": aot,
        "aot_unpaired": aot_unpaired,
        "aot_pair": aot_unpaired,
        "apo_zero": apo_zero,
        "apo_down": apo_down,
        "discopop": discopop,
        "sft": sft,
        "dpop": dpop,
        "odpo": odpo,
        "r_dpo": r_dpo,
        "cal_dpo": cal_dpo,
        "beta_dpo": beta_dpo,
        "chi_po": chi_po,
        "simpo": simpo,
        "cpo": cpo,
        "orpo": orpo,
        "alphapo": alpha_po,
        "kto": kto,
        "apo_zero_unpaired": apo_zero_unpaired,
        "bco": bco,
    }
)
