"""How a run is carried out: devices, processes, checkpoints, logs. All of it may differ on resume."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least


@dataclass(frozen=True)
class RunConfig:
    """How the model is computed.

    Args:
        attention: the kernel of attention; auto means the best one for a run's devices and mesh
            (nn/backends.py:BACKENDS).
        remat: what the backward pass recomputes of a block: nothing, all but the matmuls' outputs, everything, all
            but the tensors of remat_names (named), or the same with these kept in the host's memory (offload).
        remat_names: block_input is the residual stream, qkv goes into attention, attention comes out of it, mlp is
            the MLP's first product.
        scan_layers: compile one block and loop over it; null means except on CPUs, where it is slower.
        profile: START:STOP, the steps of which a profiler trace is written into the run's directory.
    """

    attention: Literal["auto", "reference", "blocked", "xla", "cudnn", "splash", "ring"] = "auto"
    remat: Literal["none", "dots", "full", "named", "offload"] = "none"
    remat_names: tuple[Literal["block_input", "qkv", "attention", "mlp"], ...] = ("attention",)
    scan_layers: bool | None = None
    profile: str | None = None

    @property
    def profile_steps(self) -> range:
        """The steps that `profile` names; empty without it."""
        if self.profile is None:
            return range(0)
        start, _, stop = self.profile.partition(":")
        check(
            start.isdecimal() and stop.isdecimal() and 1 <= int(start) < int(stop),
            "run.profile",
            self.profile,
            "is not START:STOP with 1 <= START < STOP, such as 10:15",
        )
        return range(int(start), int(stop))


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when.

    Args:
        save_interval_steps: steps between checkpoints.
        keep_last: how many of the newest checkpoints are kept.
        keep_best: whether the one with the lowest validation loss is kept besides.
    """

    save_interval_steps: int = 250
    keep_last: int = 2
    keep_best: bool = True

    def __post_init__(self):
        check_at_least(1, "checkpoint", self, "save_interval_steps", "keep_last")


AXIS = {"mesh_axis": True}  # metadata of a field that is the size of a mesh axis


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; -1 on one axis means all that are left.

    Args:
        data: copies of the model, each with its share of the batch.
        fsdp: parts that weights and optimizer state are cut into, each with its share of the batch.
        tensor: parts that heads, MLP and vocabulary are cut into.
        context: parts that the sequence is cut into.
        slices: groups of devices that only a data-centre network joins (TPU slices, GPU nodes), along `data`.
        cpu_devices: virtual devices on a CPU; null means one.
    """

    data: int = field(default=-1, metadata=AXIS)
    fsdp: int = field(default=1, metadata=AXIS)
    tensor: int = field(default=1, metadata=AXIS)
    context: int = field(default=1, metadata=AXIS)
    slices: int = 1
    cpu_devices: int | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Size by axis name, -1 for what is left; in the order in which they are declared."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("mesh_axis")}

    def __post_init__(self):
        for name, size in self.axes.items():
            check(size >= 1 or size == -1, f"mesh.{name}", size, "must be at least 1, or -1 for what is left")
        open_axes = list(self.axes.values()).count(-1)
        check(open_axes <= 1, "mesh", self.axes, "has -1 twice; only one axis can be the rest")
        check_at_least(1, "mesh", self, "cpu_devices", "slices")
        check((self.cpu_devices or 1) <= 512, "mesh.cpu_devices", self.cpu_devices, "must be at most 512")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Under Slurm, on Kubernetes and on TPUs they find each other; elsewhere say who they are.

    Args:
        coordinator: host:port of process 0.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        heartbeat_timeout_s: seconds of silence that make a process lost; the others end within twice as many.
        stall_timeout_s: seconds without the end of a step (the first, which compiles, has six times as long) that
            make a process write its threads' stacks and end; null means never.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout_s: int = 20
    stall_timeout_s: int | None = 600

    def __post_init__(self):
        given = [self.coordinator, self.num_processes, self.process_id]
        check(
            all(v is None for v in given) or all(v is not None for v in given),
            "distributed",
            dataclasses.asdict(self),
            "needs coordinator, num_processes and process_id together, or none of them",
        )
        check_at_least(1, "distributed", self, "heartbeat_timeout_s", "stall_timeout_s")


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl.

    Args:
        trackers: any of tensorboard and wandb (extras of the same names).
        project: the project's name at Weights & Biases.
        sample_tokens: length of the sample that samples.jsonl keeps after each evaluation, for `gptjax report`; 0
            keeps only the one at the end.
    """

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "gptjax"
    sample_tokens: int = 0
