"""What a layer stores for the backward pass, as policies of `jax.checkpoint`.

`blocks.py` applies them to each layer.
"""

import jax

from .attended import ATTENDED
from .experts import CHOSEN, PRODUCTS

# The outputs of its matrix products with weights, and of its attention. Everything in between is
# recomputed, which is faster than writing and reading it.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENDED, PRODUCTS, CHOSEN),
)
# If layers are recomputed: nothing but the choices of the routers.
CHOICES = jax.checkpoint_policies.save_only_these_names(CHOSEN)
