"""The NVIDIA GPUs that programs are lowered for, if they are not in this process.

JAX asks the devices of the process, which may have none. `by_platform.py` chooses by platform.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax


class Capability(NamedTuple):
    """A compute capability, such as 9.0 of Hopper."""

    major: int
    minor: int


# The oldest generation with cuDNN's attention kernel, in place of an unknown one.
AMPERE = Capability(8, 0)
# The version of cuDNN that JAX sees for devices that are not there: 9.12.
_CUDNN_VERSION = 91200

_ASSUMED: ContextVar[Capability | None] = ContextVar("_ASSUMED", default=None)


def capability() -> Capability:
    """The compute capability of the GPUs: of `assume`, of those of this process, or `AMPERE`."""
    return _ASSUMED.get() or _here() or AMPERE


@contextlib.contextmanager
def assume(found: Capability | None) -> Iterator[None]:
    """Programs that are lowered inside are for GPUs of this capability; `None` changes nothing."""
    token = _ASSUMED.set(found or _ASSUMED.get())
    try:
        yield
    finally:
        _ASSUMED.reset(token)


@contextlib.contextmanager
def as_if_cudnn_were_here() -> Iterator[None]:
    """Code that calls cuDNN's kernel can be traced inside, whatever devices this process has.

    JAX asks them for the version of cuDNN and for their capability, and has no public way to answer
    for others. If there is a GPU and nothing is assumed, this does nothing.
    """
    if _ASSUMED.get() is None and _here() is not None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    def is_at_least(asked: str) -> bool:
        return capability() >= tuple(map(int, asked.split(".")))

    def equals(asked: str) -> bool:
        return capability() == tuple(map(int, asked.split(".")))

    answers = {
        "check_cudnn_version": lambda: _CUDNN_VERSION,
        "check_compute_capability": is_at_least,
        "is_cuda_compute_capability_equal": equals,
    }
    functions = {name: getattr(kernel, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(kernel, name, answer)
        yield
    finally:
        for name, function in functions.items():
            setattr(kernel, name, function)


def _here() -> Capability | None:
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    return Capability(*map(int, device.compute_capability.split(".")))
