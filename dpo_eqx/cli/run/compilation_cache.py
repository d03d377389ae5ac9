"""Compiled programs on disk, so that the same run does not compile again.

JAX writes and reads them; this file only says where.
"""

from pathlib import Path

import jax

from ...data._tokens.store import default_folder

_OPTION = "jax_compilation_cache_dir"


def use_compilation_cache(folder: str) -> None:
    """Makes JAX keep compiled programs in a folder, from the next compilation on.

    A folder that the user gave to JAX (`JAX_COMPILATION_CACHE_DIR`) stays.

    **Arguments:**

    - `folder`: the folder; `none` for no folder; `auto` for one in the user's cache folder. A
        program depends on the versions of JAX and XLA, so each version has a folder of its own.
    """
    if folder == "none" or getattr(jax.config, _OPTION) is not None:
        return
    path = default_folder() / "compiled" if folder == "auto" else Path(folder)
    jax.config.update(_OPTION, str(path / f"jax-{jax.__version__}"))
