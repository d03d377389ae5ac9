"""Direct Preference Optimization for JAX: a functional core, with Equinox models beside it."""

from . import losses as losses
from .batch import PreferenceBatch as PreferenceBatch, UnpairedBatch as UnpairedBatch
from .compare import Comparison as Comparison, compare as compare
from .diagnose import (
    Diagnosis as Diagnosis,
    diagnose as diagnose,
    make_diagnose as make_diagnose,
)
from .evaluate import make_eval as make_eval
from .kl import linear_kl as linear_kl, token_kl as token_kl
from .layout import FastPolicy as FastPolicy, Layout as Layout
from .linear import linear_token_log_probs as linear_token_log_probs
from .log_probs import (
    PairLogProbs as PairLogProbs,
    UnpairedLogProbs as UnpairedLogProbs,
    sequence_log_probs as sequence_log_probs,
    token_log_probs as token_log_probs,
)
from .losses.form import PairLoss as PairLoss, UnpairedLoss as UnpairedLoss
from .master import master_weights as master_weights
from .metrics import Metrics as Metrics, default_metrics as default_metrics
from .packed import PackedBatch as PackedBatch, PackedLayout as PackedLayout
from .packed_score import score_packed as score_packed
from .preferences import (
    Calibration as Calibration,
    Preferences as Preferences,
    calibrate as calibrate,
    count_preferences as count_preferences,
)
from .reference import (
    precompute_reference as precompute_reference,
    snapshot as snapshot,
    sync_reference as sync_reference,
)
from .score import (
    ld_score as ld_score,
    score_pairs as score_pairs,
    score_unpaired as score_unpaired,
)
from .step import make_grad as make_grad, make_step as make_step
from .tokens import Tokens as Tokens

__version__ = "0.1.0"
