"""The head of a reward model in a checkpoint: one row of weights in place of the unembedding.

`transformers` writes such folders as `*ForSequenceClassification` with one label.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .families import FAMILIES
from .family import CLASSIFIER
from .folder import Weights
from .tensor_names import Index

# The tensor of the head, and the path of our leaf.
TENSOR, PATH = "score.weight", "head.weight"


def is_reward_model(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a sequence classifier."""
    return any(name.endswith(CLASSIFIER) for name in values.get("architectures") or ())


def take_head(weights: Weights) -> tuple[str, Callable[[int, Index], np.ndarray]]:
    """Takes the head out of the tensors: its stored dtype, and a function that reads it.

    **Raises:**

    `ValueError` if there is no head, or if it has several labels.
    """
    shape = weights.shapes.get(TENSOR)
    if shape is None or len(shape) != 2 or shape[0] != 1:
        found = "there is none" if shape is None else f"it has shape {shape}"
        raise ValueError(
            f"The checkpoint in {weights.folder} is a sequence classifier. It is a reward model if "
            f"its tensor {TENSOR!r} has one label, shape (1, width); {found}. Classifiers of "
            "several labels are not supported."
        )
    dtype, tensor = weights.dtypes[TENSOR], weights.read(TENSOR)
    weights.drop(TENSOR)
    return dtype, lambda _, index: tensor[tuple(slice(*bounds) for bounds in index)]


def reward_keys(model_type: str, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config.json` of a reward model of a family.

    `loaded` is the `config.json` that it was loaded from, whose names of labels stay.

    **Raises:**

    `ValueError` if `transformers` has no class for it.
    """
    classifier = FAMILIES[model_type].classifier
    if classifier is None:
        raise ValueError(
            f"`policy` is a reward model of the family {model_type!r}, for which `transformers` "
            "has no class, so that nothing would load it. Write it with "
            "`eqx.tree_serialise_leaves`, or its body alone with `models.save(policy.body, path)`."
        )
    names = ("id2label", "label2id") if is_reward_model(loaded) else ()
    own = {key: loaded[key] for key in names if key in loaded}
    return {
        "architectures": [classifier],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        **own,
    }
