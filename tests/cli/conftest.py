"""Models with their tokenizers, put together from the golden files."""

import jax
import pytest

from .runs import with_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A function from `llama`, `qwen3` or `gpt2` to the folder of a model with its tokenizer."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = with_tokenizer(kind, tmp_path_factory.mktemp("models") / kind)
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs: the same run comes several times."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(compiled):
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _as_users_run_it(tmp_path, monkeypatch):
    """Caches go to the test's folder; Optax does not keep to strict promotion."""
    monkeypatch.setenv("DPO_EQX_CACHE", str(tmp_path / "cache"))
    with jax.numpy_dtype_promotion("standard"):
        yield
