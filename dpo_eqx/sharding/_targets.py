"""The chips that a step can be planned for: what they can do, and devices to compile for.

A device of a chip that is not there has no memory and runs nothing, but XLA compiles for it if the
plugin of its platform is installed. `_plan.py` compiles.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence

import jax
from jax.experimental import topologies

from .._jax.gpus import Capability


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do; `None` if it is not known.

    - `memory`: bytes.
    - `rate`: dense operations in bfloat16, per second.
    - `bandwidth`: bytes to and from memory, per second.
    - `links`: bytes that a device sends to its neighbours, per second.
    """

    memory: int
    rate: float | None
    bandwidth: float | None
    links: float | None


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of one kind.

    - `name`: as the user gave it.
    - `platform`: as JAX names it.
    - `capability`: of NVIDIA GPUs that are not here.
    """

    name: str
    chip: Chip
    platform: str
    devices: Sequence[jax.Device]
    capability: Capability | None = None


# From the vendors' data sheets. NVLink and PCIe are counted in one direction, and the links between
# TPUs all together.
CHIPS = {
    "a100": Chip(85_100_068_864, 312e12, 2.04e12, 300e9),
    "h100": Chip(84_942_979_072, 989e12, 3.35e12, 450e9),
    "h200": Chip(151_397_597_184, 989e12, 4.8e12, 450e9),
    "b200": Chip(191_514_411_008, 2250e12, 7.67e12, 900e9),
    "l4": Chip(23_800_000_000, 121e12, 0.3e12, 32e9),
    "v5e": Chip(16 * 2**30, 197e12, 0.819e12, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 448e9),
}

# What XLA's compiler asks of an NVIDIA GPU: its numbers, from XLA's own descriptions.
_GPUS = {
    "a100": {"core_count": 108, "l2_cache_size": 41943040, "clock_rate_ghz": 1.41},
    "h100": {"core_count": 132, "l2_cache_size": 52428800, "clock_rate_ghz": 1.98},
    "h200": {"core_count": 132, "l2_cache_size": 52428800, "clock_rate_ghz": 1.98},
    "b200": {"core_count": 148, "l2_cache_size": 132644864, "clock_rate_ghz": 1.965},
    "l4": {"core_count": 58, "l2_cache_size": 50331648, "clock_rate_ghz": 2.04},
}
_CAPABILITY = {
    "a100": Capability(8, 0),
    "h100": Capability(9, 0),
    "h200": Capability(9, 0),
    "b200": Capability(10, 0),
    "l4": Capability(8, 9),
}
# Bytes of shared memory in a core, for chips that differ from Hopper and Blackwell.
_SHARED_MEMORY = {"a100": 167936, "l4": 102400}
_GPUS_OF_A_HOST = 8
_TPU_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}
_TPUS_OF_A_HOST = 4


def find_target(name: str) -> Target:
    """The devices that `name` describes.

    **Arguments:**

    - `name`: a chip, with a number of devices or, for TPUs, a topology: `"h100:8"`, `"v5e:2x2"`,
        `"cpu:8"`. `here` is the devices of this process. One device without a number.

    **Raises:**

    `ValueError` if the chip or the number is not known; `ImportError` if the compiler for the chip
    is not installed.
    """
    chip, _, size = name.partition(":")
    if chip == "cpu":
        return _cpus(name, _count(name, size))
    if chip == "here":
        return _here(name, _count(name, size))
    if chip not in CHIPS:
        raise ValueError(
            f"`target` must be one of here, cpu, {', '.join(CHIPS)}, with a number of devices or, "
            f"for TPUs, a topology, such as 'h100:8' or 'v5e:2x2'; got {name!r}."
        )
    if chip in _GPUS:
        gpus = _gpus(name, chip, _count(name, size))
        return Target(name, CHIPS[chip], "cuda", gpus, _CAPABILITY[chip])
    return Target(name, CHIPS[chip], "tpu", _tpus(name, chip, size))


def _count(name: str, size: str) -> int:
    if size and not (size.isdecimal() and int(size) > 0):
        raise ValueError(
            f"`target` must give a positive number of devices, such as 'h100:8'; got {name!r}."
        )
    return int(size or 1)


def _cpus(name: str, count: int) -> Target:
    """Devices of this process: their memory is that of the machine, in equal parts."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"`target` needs {count} CPU devices; this process has {len(devices)}. Set them before "
            f"JAX starts: jax.config.update('jax_num_cpu_devices', {count})."
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
    return Target(name, Chip(memory, None, None, None), "cpu", devices[:count])


def _here(name: str, count: int) -> Target:
    """The first devices that JAX would use."""
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"`target` needs {count} devices; there are {len(devices)} here.")
    first = devices[0]
    if first.platform == "cpu":
        return dataclasses.replace(_cpus(name, count), devices=devices[:count])
    chip = chip_of_kind(first.device_kind)
    memory = (first.memory_stats() or {}).get("bytes_limit") or chip.memory
    platform = "cuda" if first.platform == "gpu" else first.platform
    chip = dataclasses.replace(chip, memory=memory)
    return Target(name, chip, platform, devices[:count])


def chip_of_kind(kind: str) -> Chip:
    """The chip that JAX calls `kind`; a chip of unknown rates if it is none of `CHIPS`."""
    names = {"v5 lite": "v5e", "v6 lite": "v6e", "v5": "v5p"}
    words = kind.lower()
    found = next((chip for name, chip in names.items() if name in words), None)
    found = found or next((chip for chip in CHIPS if chip in words), None)
    return CHIPS[found] if found else Chip(0, None, None, None)


def _gpus(name: str, chip: str, count: int) -> Sequence[jax.Device]:
    hosts, rest = divmod(count, _GPUS_OF_A_HOST)
    if count > _GPUS_OF_A_HOST and rest:
        raise ValueError(
            f"`target` must have at most {_GPUS_OF_A_HOST} GPUs, or a multiple of "
            f"{_GPUS_OF_A_HOST}, for several hosts; got {name!r}."
        )
    topology = f"1x{count}x1" if count <= _GPUS_OF_A_HOST else f"{hosts}x{_GPUS_OF_A_HOST}x1"

    def describe():
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_description(chip), topology=topology
        )

    return _compile_only(describe, name, extra="cuda13")


def _description(chip: str) -> str:
    """The text of XLA's `GpuTargetConfigProto`."""
    facts = dict(_GPUS[chip])
    (major, minor), shared = _CAPABILITY[chip], _SHARED_MEMORY.get(chip, 233472)
    facts |= {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared,
        # A block may use all of it but one KiB.
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 1536 if chip == "l4" else 2048,
        "fpus_per_core": 64 if chip == "a100" else 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(CHIPS[chip].bandwidth or 0),
        "device_memory_size": CHIPS[chip].memory,
    }
    numbers = " ".join(f"{key}: {value}" for key, value in facts.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {numbers} {capability} }} platform_name: 'CUDA' "
        "dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 } "
        f"device_description_str: 'NVIDIA {chip.upper()}'"
    )


def _tpus(name: str, chip: str, size: str) -> Sequence[jax.Device]:
    if re.fullmatch(r"\d+(x\d+)+", size):
        shape = tuple(map(int, size.split("x")))
    else:
        shape = _tpu_shape(_count(name, size), _TPU_AXES[chip])
    if len(shape) != _TPU_AXES[chip]:
        raise ValueError(
            f"`target` must have {_TPU_AXES[chip]} axes of {chip}, such as "
            f"{'x'.join(['2'] * _TPU_AXES[chip])!r}; got {name!r}."
        )
    # Not on Google's cloud, so there is no server with facts about the machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = f"{chip}:{'x'.join(map(str, shape))}"
    # A host has four chips, and one chip alone is a host of its own.
    few = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) < _TPUS_OF_A_HOST else {}

    def describe():
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **few)

    return _compile_only(describe, name, extra="tpu")


def _tpu_shape(count: int, axes: int) -> tuple[int, ...]:
    """The topology of this number of chips, nearest to a cube: 8 chips are 2x4 or 2x2x2."""
    shape = [1] * axes
    while math.prod(shape) < count:
        shape[shape.index(min(shape))] *= 2
    if math.prod(shape) != count:
        raise ValueError(
            f"`target` must have a number of TPUs that is a power of 2, or a topology such as "
            f"'v5e:2x3'; got {count}."
        )
    return tuple(sorted(shape))


def _compile_only(
    describe: Callable[[], topologies.TopologyDescription], name: str, *, extra: str
) -> Sequence[jax.Device]:
    try:
        return list(describe().devices)
    # JAX raises several kinds, and only their text says that a plugin is missing.
    except Exception as error:
        raise ImportError(
            f"`target` {name!r} needs the compiler for its platform, which could not be started: "
            f'{error}. Install it: pip install "jax[{extra}]".'
        ) from error
