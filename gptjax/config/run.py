"""The config sections that say how a run is carried out: kernels, mesh, processes, checkpoints, logs.

All of them may differ on resume.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptjax.checks import check, check_at_least


@dataclass(frozen=True)
class RunConfig:
    """How the model is computed.

    Args:
        attention: the attention kernel; auto chooses the fastest one for the devices and the mesh. Name one to
            compare kernels, or where auto's choice fails (docs/parallelism.md lists them).
        remat: how much of a block the backward pass recomputes to save memory: none (fastest); dots, which stores
            only the outputs of matmuls; full, which stores only the block's input; named, which stores the tensors of
            remat_names; or offload, which stores those in the host's memory.
        remat_names: tensors that named and offload store: block_input (the residual stream), qkv (the inputs of
            attention), attention (its output), mlp (the MLP's first product).
        scan_layers: compile one block and scan over the layers, which shortens compilation; null means true except on
            CPUs, where a scan is slower.
        pipeline_microbatches: into how many parts mesh.pipeline cuts the sequences of a step (of train.microbatches);
            null means up to four a stage. With more, the stages are idle for less, and compute in smaller products.
        verify_interval_steps: steps between checks for devices that compute or store wrong values without an error:
            weights are compared between the devices that hold them, and a gradient between replicas of the data; a
            check takes as long as about two steps. null means none.
        profile: steps to profile, as START:STOP such as 10:15; the trace is written into the run's directory.
    """

    attention: str = "auto"
    remat: Literal["none", "dots", "full", "named", "offload"] = "none"
    remat_names: tuple[Literal["block_input", "qkv", "attention", "mlp"], ...] = ("attention",)
    scan_layers: bool | None = None
    pipeline_microbatches: int | None = None
    verify_interval_steps: int | None = None
    profile: str | None = None

    def __post_init__(self):
        check_at_least(1, "run", self, "verify_interval_steps", "pipeline_microbatches")

    @property
    def profile_steps(self) -> range:
        """Return the steps to profile; empty if `profile` is null."""
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
    """Checkpoints: when they are written, and which are kept.

    Args:
        save_interval_steps: steps between checkpoints; a killed run loses at most this many.
        keep_last: number of most recent checkpoints to keep; keep at least 2, so that a damaged one can be skipped.
        keep_best: also keep the checkpoint with the lowest validation loss.
    """

    save_interval_steps: int = 250
    keep_last: int = 2
    keep_best: bool = True

    def __post_init__(self):
        check_at_least(1, "checkpoint", self, "save_interval_steps", "keep_last")


AXIS = {"mesh_axis": True}  # metadata of a field that is the size of a mesh axis


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh. The product of the axes is the number of devices; -1 on one axis means all remaining devices.

    Args:
        data: data parallelism: replicas of the model, each with its share of the batch. Use it while the model fits
            on one device.
        fsdp: shards of weights and optimizer state, each device with its share of the batch. Raise it until the model
            fits.
        tensor: shards of heads, MLP and vocabulary. Use it within a fast interconnect, where fsdp alone leaves less
            than one sequence a device.
        context: shards of each sequence (ring attention). Use it for contexts that do not fit on one device.
        expert: shards of the experts of model.mlp.kind moe; elsewhere in the model, each device has its share of the
            batch, as with data. Use it where experts are too many for one device.
        pipeline: stages that the layers are cut into, through which microbatches pass; outside the blocks, each
            device has its share of the batch. Use it where weights do not fit and fsdp's network is too slow.
        slices: groups of devices joined only by a data-centre network (TPU slices, GPU nodes); mesh.data spans them
            and must be a multiple of it.
        cpu_devices: number of virtual CPU devices, to try a mesh without its hardware; null means one.
    """

    data: int = field(default=-1, metadata=AXIS)
    fsdp: int = field(default=1, metadata=AXIS)
    tensor: int = field(default=1, metadata=AXIS)
    context: int = field(default=1, metadata=AXIS)
    expert: int = field(default=1, metadata=AXIS)
    pipeline: int = field(default=1, metadata=AXIS)
    slices: int = 1
    cpu_devices: int | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Return the axis sizes by name, in the order of declaration; -1 means all remaining devices."""
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
    """Several processes. Slurm, Kubernetes and TPUs are detected; elsewhere, set the first three.

    Args:
        coordinator: HOST:PORT of process 0, the same for all processes.
        num_processes: total number of processes.
        process_id: number of this process, from 0; it differs for each.
        heartbeat_timeout_s: seconds without a heartbeat after which a process counts as lost; the others end within
            twice this time. Raise it where hosts pause, as in live migration.
        stall_timeout_s: seconds without a completed step (six times as many for the first, which compiles) after
            which a process prints the stacks of its threads and ends; null means never. Raise it if an evaluation or
            a checkpoint takes longer.
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
    """Logging in addition to metrics.jsonl.

    Args:
        trackers: where metrics are logged as well: tensorboard, wandb, or both (pip extras of the same names).
        project: name of the project at Weights & Biases.
        sample_tokens: length in tokens of a sample that each evaluation adds to samples.jsonl, which `gptjax report`
            shows; 0 samples only at the end of the run.
    """

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    project: str = "gptjax"
    sample_tokens: int = 0
