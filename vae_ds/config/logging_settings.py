"""The settings of what a run tells about itself: rows, curves, progress, profiles."""

from typing import Literal

from pydantic import Field

from vae_ds.config.data_settings import Settings


class LoggingConfig(Settings):
    every: int = Field(10, ge=1, description="applied steps between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="write TensorBoard event files to the run directory")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="send settings and curves to these, too: wandb, mlflow; each is an extra of the package"
    )
    progress: bool = Field(True, description="show a progress bar on the terminal")


class ProfileConfig(Settings):
    start: int = Field(20, ge=1, description="first step of a phase to profile, counted since the start or resumption")
    steps: int = Field(3, ge=1, description="number of steps to profile")
