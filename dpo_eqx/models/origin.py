"""The small files of a checkpoint that travel with its policy: tokenizer, generation settings.

They are no part of what a policy computes; reading and writing them is in `folder.py`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Origin:
    """The files that `models.load` found beside the weights, for `models.save` to write again.

    It is compared by the content of the files: two policies with different tokenizers differ as
    pytrees, so that a jitted step never hands one the tokenizer of the other. A policy without
    any files is equal to all.

    **Arguments:**

    - `files`: contents by name.
    - `config`: the parsed `config.json`, of which the keys that we do not read are written again.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Origin):
            return NotImplemented
        return not self.files or not other.files or self.files == other.files

    def __hash__(self) -> int:
        # One value, since the one without files equals every other.
        return hash(Origin)

    def __repr__(self) -> str:
        contents = b"".join(self.files[name] for name in sorted(self.files))
        return f"Origin({hashlib.sha256(contents).hexdigest()[:8] if self.files else ''})"
