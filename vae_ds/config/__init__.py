"""Recipes: typed settings, the YAML files that contain them, dotted overrides, and access to the Hugging Face hub.

Depends only on `errors`.
"""

from vae_ds.config import hub
from vae_ds.config.data_settings import SPLITS, DataConfig, Settings
from vae_ds.config.loading import (
    Config,
    build,
    dump,
    load,
    read_recipe,
    reference,
    shipped_recipes,
)
from vae_ds.config.model_settings import LoraConfig, ModelConfig
from vae_ds.config.paths import absolute, portable
from vae_ds.config.settings import (
    AggressiveConfig,
    ArchitectureConfig,
    BatchConfig,
    CheckpointConfig,
    ConstantBeta,
    CyclicalBeta,
    EvaluationConfig,
    FreeBits,
    LearningRateConfig,
    LinearBeta,
    OptimizerConfig,
    PhaseConfig,
    PretrainConfig,
    ProfileConfig,
    RunConfig,
    SiteConfig,
    StudyConfig,
    TimeoutConfig,
)
from vae_ds.config.yaml_tree import EXCLUSIVE, override, parse_yaml, split_override

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
    "FreeBits",
    "LearningRateConfig",
    "LinearBeta",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PretrainConfig",
    "ProfileConfig",
    "RunConfig",
    "Settings",
    "SiteConfig",
    "StudyConfig",
    "TimeoutConfig",
    "absolute",
    "build",
    "dump",
    "hub",
    "load",
    "override",
    "parse_yaml",
    "portable",
    "read_recipe",
    "reference",
    "shipped_recipes",
    "split_override",
]
