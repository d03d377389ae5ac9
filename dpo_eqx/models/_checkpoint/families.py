"""All families of checkpoints by `model_type`, as data.

`family.py` defines a family, and the modules that this one joins have their tables.
"""

from .families_experts import EXPERTS
from .families_gpt import GPTS
from .families_hybrid import HYBRIDS
from .families_layer_norm import LAYER_NORM
from .families_llama import LLAMAS
from .families_norms import NORMS
from .family import Family as Family

FAMILIES: dict[str, Family] = {**LLAMAS, **NORMS, **LAYER_NORM, **GPTS, **HYBRIDS, **EXPERTS}
