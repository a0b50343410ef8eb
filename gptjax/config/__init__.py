"""Every knob of a run, as frozen dataclasses with their checks. `configfile.py` reads and writes them.

A config file states only what differs from the defaults. Nothing here imports JAX, because the number of virtual CPU
devices must be fixed before JAX starts.
"""

from dataclasses import dataclass, field

from gptjax.checks import check
from gptjax.config.data import DataConfig, MixtureSource
from gptjax.config.finetuning import DistillConfig, DpoConfig
from gptjax.config.lora import LoraConfig
from gptjax.config.model import (
    AttentionConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    ParametrizationConfig,
    PositionsConfig,
    RopeScaling,
)
from gptjax.config.overrides import nested_values, override, plain_values
from gptjax.config.resume import FREE, free_keys
from gptjax.config.run import CheckpointConfig, DistributedConfig, LogConfig, MeshConfig, RunConfig
from gptjax.config.training import OptimConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "DistributedConfig",
    "DpoConfig",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "MixtureSource",
    "MlpConfig",
    "ModelConfig",
    "MoeConfig",
    "NormConfig",
    "OptimConfig",
    "ParametrizationConfig",
    "PositionsConfig",
    "RopeScaling",
    "RunConfig",
    "TrainConfig",
    "free_keys",
    "nested_values",
    "override",
    "plain_values",
]


@dataclass(frozen=True)
class Config:
    """A training run: everything that its config file may set.

    Args:
        seed: seed of the initial weights, the order of the data and dropout; change it to repeat a run independently.
        workdir: the run's directory, on a disk or in a bucket; null means runs/NAME, after the config file's name. A
            run that the directory already holds is resumed.
        init_from: start from the weights of this model instead of random ones: the directory of a run, a Hugging Face
            directory or id, or a .gguf file; null means random weights.
        follow: a folder in which folders of `gptjax data prepare` appear, to train on in place of data.path; the run
            looks for new ones at every evaluation, and data.replay of the examples are then from the earlier ones.
    """

    seed: int = 1337
    workdir: str | None = field(default=None, metadata=FREE)
    init_from: str | None = field(default=None, metadata=FREE)
    follow: str | None = field(default=None, metadata=FREE)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig, metadata=FREE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=FREE)
    distributed: DistributedConfig = field(default_factory=DistributedConfig, metadata=FREE)
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE)

    def __post_init__(self):
        check(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")
        chunks, length = self.train.loss_chunks, self.model.context_length
        check(
            length % (chunks or 1) == 0, "train.loss_chunks", chunks, f"does not divide model.context_length {length}"
        )
        stop, total = self.run.profile_steps.stop, self.train.total_steps
        check(stop <= total + 1, "run.profile", self.run.profile, f"must stop at {total + 1} or before")
