"""The devices and processes of a run."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Several devices and processes."""

    mesh: str | None = None
    """The mesh of devices, `data=4,fsdp=2,tensor=1`. Pairs are split over data and fsdp, parameters
    over fsdp and tensor. With `expert=4` in place of `fsdp=4`, each device keeps some of the
    experts of a mixture (default: one device, or the devices of all processes along data if there
    are several processes)."""
    coordinator: str | None = None
    """The address HOST:PORT of process 0 if several processes train together. `auto` asks the
    cluster (Slurm, Open MPI, Kubernetes, TPU pods)."""
    num_processes: int | None = None
    """Number of processes that train together."""
    process_id: int | None = None
    """The number of this process, from 0."""
