"""Preference losses, all of one form: `loss(policy, reference, *, ...) -> PairLoss`."""

from .._arrays.loss_values import PairLoss as PairLoss, UnpairedLoss as UnpairedLoss
from ._adaptive import beta_dpo as beta_dpo, update_margin as update_margin
from ._anchored import (
    apo_down as apo_down,
    apo_zero as apo_zero,
    bco_pair as bco_pair,
    cal_dpo as cal_dpo,
    nca as nca,
    sppo as sppo,
)
from ._combinators import (
    combine as combine,
    length_normalized as length_normalized,
    reference_free as reference_free,
    wpo as wpo,
)
from ._difference import discopop as discopop, exo as exo, hinge as hinge, ipo as ipo
from ._divergences import (
    alpha_divergence as alpha_divergence,
    forward_kl as forward_kl,
    jensen_shannon as jensen_shannon,
    reverse_kl as reverse_kl,
)
from ._dpo import dpo as dpo, robust_dpo as robust_dpo
from ._likelihood import alpha_po as alpha_po, cpo as cpo, orpo as orpo, sft as sft, simpo as simpo
from ._margins import chi_po as chi_po, dpop as dpop, odpo as odpo, r_dpo as r_dpo
from ._marks import couples_pairs as couples_pairs
from ._names import BY_NAME as BY_NAME
from ._optimism import xpo as xpo
from ._rewards import bradley_terry as bradley_terry
from ._shift import batch_delta as batch_delta, update_delta as update_delta
from ._transport import aot as aot, aot_unpaired as aot_unpaired
from ._unpaired import apo_zero_unpaired as apo_zero_unpaired, bco as bco, kto as kto
