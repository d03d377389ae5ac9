"""Preference losses, all of one form: `loss(policy, reference, *, ...) -> PairLoss`."""

from .adaptive import beta_dpo as beta_dpo, update_margin as update_margin
from .anchored import (
    apo_down as apo_down,
    apo_zero as apo_zero,
    bco_pair as bco_pair,
    cal_dpo as cal_dpo,
    nca as nca,
    sppo as sppo,
)
from .combinators import (
    combine as combine,
    length_normalized as length_normalized,
    reference_free as reference_free,
    wpo as wpo,
)
from .difference import discopop as discopop, exo as exo, hinge as hinge, ipo as ipo
from .divergences import (
    alpha_divergence as alpha_divergence,
    forward_kl as forward_kl,
    jensen_shannon as jensen_shannon,
    reverse_kl as reverse_kl,
)
from .dpo import dpo as dpo, robust_dpo as robust_dpo
from .form import (
    PairLoss as PairLoss,
    UnpairedLoss as UnpairedLoss,
    couples_pairs as couples_pairs,
)
from .likelihood import (
    alpha_po as alpha_po,
    cpo as cpo,
    orpo as orpo,
    sft as sft,
    simpo as simpo,
)
from .margins import chi_po as chi_po, dpop as dpop, odpo as odpo, r_dpo as r_dpo
from .names import BY_NAME as BY_NAME
from .shift import batch_delta as batch_delta, update_delta as update_delta
from .transport import aot as aot, aot_unpaired as aot_unpaired
from .unpaired import apo_zero_unpaired as apo_zero_unpaired, bco as bco, kto as kto
