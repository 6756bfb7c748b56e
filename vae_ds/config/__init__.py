"""Recipes: typed settings, the YAML files that hold them, dotted overrides, and the hub's names.

Stands on `errors` alone.
"""

from vae_ds.config import hub
from vae_ds.config.loading import (
    Config,
    build,
    dump,
    load,
    read_recipe,
    reference,
    shipped_recipes,
)
from vae_ds.config.settings import (
    SPLITS,
    AggressiveConfig,
    ArchitectureConfig,
    BatchConfig,
    CheckpointConfig,
    ConstantBeta,
    CyclicalBeta,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    LinearBeta,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    PretrainConfig,
    RunConfig,
    Settings,
    SiteConfig,
    StudyConfig,
    TimeoutConfig,
)
from vae_ds.config.yaml_tree import EXCLUSIVE, differences, split_override

__all__ = [
    "EXCLUSIVE",
    "SPLITS",
    "AggressiveConfig",
    "ArchitectureConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "ConstantBeta",
    "CyclicalBeta",
    "DataConfig",
    "EvaluationConfig",
    "LearningRateConfig",
    "LinearBeta",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PretrainConfig",
    "RunConfig",
    "Settings",
    "SiteConfig",
    "StudyConfig",
    "TimeoutConfig",
    "build",
    "differences",
    "dump",
    "hub",
    "load",
    "read_recipe",
    "reference",
    "shipped_recipes",
    "split_override",
]
