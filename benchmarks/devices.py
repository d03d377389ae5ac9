"""The bytes that a step sends between devices and holds on each, read from compiled programs.

    python -m benchmarks.devices           # 8, 64 and 256 virtual devices: a few minutes, 2 GB
    python -m benchmarks.devices 8         # one of these

Nothing runs and nothing is allocated: programs are compiled for virtual CPU devices, with a process
for each number of devices. Megabytes are the bytes that one device sends in a ring, and the least
is the ring minimum. CPUs have no reduce-scatter: they all-reduce an array and then take a shard of
it. `accelerator` counts such an all-reduce as a reduce-scatter. The number of collectives in the
program must not grow with the devices.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

MESHES = {
    8: ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"],
    64: ["data=64", "fsdp=64", "tensor=64", "data=4,fsdp=4,tensor=4"],
    256: ["data=256", "fsdp=256", "data=4,tensor=64", "data=8,fsdp=8,tensor=4"],
}
LAYERS, WIDTH, VOCAB, PROMPT, COMPLETION, CHUNK = 4, 256, 1024, 48, 40, 512


def rows(count: int) -> None:
    """Prints a line for each mesh of `count` devices."""
    from dpo_eqx import sharding

    for sizes in MESHES[count]:
        mesh = sharding.make_mesh(sizes)
        show(sizes, "filter_jit", compiled(mesh, count), mesh, count)
    mesh = sharding.make_mesh(f"data={count}")
    show(f"data={count}", "shard_map", mapped(mesh, count), mesh, count)


def options(count: int) -> dict:
    """Two pairs for each device, and the same model for every mesh."""
    from dpo_eqx import models

    config = models.Config(vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=64, remat=True)
    lengths = {"prompt": PROMPT, "completion": COMPLETION, "chunk_size": CHUNK}
    return {"config": config, "pairs": 2 * count, **lengths}


def compiled(mesh: Any, count: int):
    """The step under automatic partitioning."""
    from tests.sharding.programs import compiled_step

    return compiled_step(mesh, **options(count))


def mapped(mesh: Any, count: int):
    """The step under `shard_map`, parameters replicated."""
    from tests.sharding.programs import mapped_step

    return mapped_step(mesh, **options(count))


def show(sizes: str, road: str, program: Any, mesh: Any, count: int) -> None:
    from dpo_eqx.sharding._collectives import collectives
    from tests.sharding.programs import peak

    moved = collectives(program.as_text())
    sent = sum(each.ring_bytes for each in moved)
    halved = sum(each.ring_bytes / 2 for each in moved if is_scattered(each, mesh))
    floor = least(mesh, count)
    print(
        f"{sizes:24} {road:10} sent {sent / 1e6:8.2f} MB  accelerator "
        f"{(sent - halved) / 1e6:8.2f}  least {floor / 1e6:8.2f}  ratio {sent / floor:5.2f}  "
        f"{len(moved):4} collectives  peak {peak(program) / 1e6:8.2f} MB a device",
        flush=True,
    )


def is_scattered(each: Any, mesh: Any) -> bool:
    """Whether an all-reduce stands for a reduce-scatter of a gradient, whose shards stay apart."""
    matrix = len(each.shape) == 2 and min(each.shape) >= WIDTH // mesh.shape["tensor"]
    return each.kind == "all-reduce" and matrix and mesh.shape["fsdp"] > 1


def least(mesh: Any, count: int) -> float:
    """The least bytes that a device must send, for the axes of the mesh.

    `data` sums the gradient once. `fsdp` gathers parameters three times, for policy and reference
    forward and for the policy backward, and scatters the gradient once. `tensor` sums activations
    four times in a layer, twice forward and twice backward, and twice for the reference.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    parameters = 4 * (LAYERS * 16 * WIDTH * WIDTH + 2 * VOCAB * WIDTH) / tensor
    tokens = 2 * count / (data * fsdp) * (PROMPT + 2 * COMPLETION)
    activations = 4 * tokens * WIDTH
    return (
        2 * away(data) * parameters / fsdp
        + 4 * away(fsdp) * parameters
        + 6 * LAYERS * 2 * away(tensor) * activations
    )


def away(parts: int) -> float:
    """The share of an array that is on other devices."""
    return (parts - 1) / parts


def in_process(count: int) -> None:
    """The lines for a number of devices, from a process that has them."""
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.devices", "--inside", str(count)]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=list(MESHES))
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        rows(arguments.inside)
        return
    for count in arguments.counts:
        in_process(count)


if __name__ == "__main__":
    main()
