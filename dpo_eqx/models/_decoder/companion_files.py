"""The small files of a checkpoint that a policy carries: tokenizer, generation settings.

They do not affect what a policy computes; `models/_checkpoint/folder.py` reads and writes them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any


class Origin:
    """The files that `models.load` found next to the weights, for `models.save` to write again.

    Origins are compared by the content of their files: two policies with different tokenizers
    differ as pytrees, so that a jitted step never gives a policy the wrong tokenizer. An origin
    without files equals every other. It is a plain class, since Equinox prints all fields of a
    dataclass: megabytes of tokenizer for each printed policy.

    **Arguments:**

    - `files`: the contents by name.
    - `config`: the parsed `config.json`. Its keys that we do not read are written again.
    - `outer`: the `model_type` of the checkpoint, if it held more than this language model.
    """

    __slots__ = ("config", "files", "outer")

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        config: Mapping[str, Any] | None = None,
        outer: str | None = None,
    ):
        self.outer = outer
        self.files: Mapping[str, bytes] = {} if files is None else files
        self.config: Mapping[str, Any] = {} if config is None else config

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Origin):
            return NotImplemented
        return not self.files or not other.files or self.files == other.files

    def __hash__(self) -> int:
        # One hash for all, since an origin without files equals every other.
        return hash(Origin)

    def __repr__(self) -> str:
        if not self.files:
            return "Origin()"
        digest = hashlib.sha256(b"".join(self.files[name] for name in sorted(self.files)))
        size = sum(map(len, self.files.values()))
        return f"Origin({len(self.files)} files, {size:,} bytes, {digest.hexdigest()[:8]})"
