"""Direct Preference Optimization for JAX: a functional core, with Equinox models."""

from . import losses as losses
from ._arrays.batches import PreferenceBatch as PreferenceBatch, UnpairedBatch as UnpairedBatch
from ._arrays.denoising import DenoisingBatch as DenoisingBatch
from ._arrays.layout import AbstractLayout as AbstractLayout, Layout as Layout
from ._arrays.log_probs import (
    PairLogProbs as PairLogProbs,
    TokenValues as TokenValues,
    UnpairedLogProbs as UnpairedLogProbs,
)
from ._arrays.loss_values import PairLoss as PairLoss, UnpairedLoss as UnpairedLoss
from ._arrays.metrics import Metrics as Metrics
from ._arrays.packed import PackedBatch as PackedBatch, PackedLayout as PackedLayout
from ._arrays.tokens import Tokens as Tokens
from ._diagnosis.ches import ches as ches
from ._diagnosis.compare import (
    Comparison as Comparison,
    ScoredComparison as ScoredComparison,
    compare as compare,
)
from ._diagnosis.diagnose import (
    Diagnosis as Diagnosis,
    diagnose as diagnose,
    make_diagnose as make_diagnose,
)
from ._diagnosis.preferences import (
    Calibration as Calibration,
    Preferences as Preferences,
    calibrate as calibrate,
    count_preferences as count_preferences,
)
from ._head.kl import linear_kl as linear_kl, token_kl as token_kl
from ._head.linear import linear_token_log_probs as linear_token_log_probs
from ._head.token_log_probs import (
    sequence_log_probs as sequence_log_probs,
    token_log_probs as token_log_probs,
)
from ._onpolicy.pair_samples import (
    label_samples as label_samples,
    pair_samples as pair_samples,
)
from ._onpolicy.text_rewards import text_rewards as text_rewards
from ._policies.adapt import adapt as adapt
from ._policies.check_policy import check_policy as check_policy
from ._policies.report import PolicyReport as PolicyReport
from ._policies.trainable import trainable as trainable
from ._scoring.denoising import denoising_score as denoising_score
from ._scoring.packed import (
    score_packed as score_packed,
    score_packed_unpaired as score_packed_unpaired,
)
from ._scoring.pseudo import pseudo_score as pseudo_score
from ._scoring.score import (
    ld_score as ld_score,
    score_pairs as score_pairs,
    score_unpaired as score_unpaired,
)
from ._training.evaluate import make_eval as make_eval
from ._training.master_weights import master_weights as master_weights
from ._training.metrics import default_metrics as default_metrics
from ._training.norms import group_norms as group_norms, parameter_group as parameter_group
from ._training.reference import (
    precompute_reference as precompute_reference,
    snapshot as snapshot,
    sync_reference as sync_reference,
)
from ._training.step import make_grad as make_grad, make_step as make_step
from .protocols import (
    Evaluate as Evaluate,
    FastPolicy as FastPolicy,
    Gradient as Gradient,
    Loss as Loss,
    MetricsFunction as MetricsFunction,
    RecurrentPolicy as RecurrentPolicy,
    Score as Score,
    Step as Step,
)

__version__ = "0.1.0"
