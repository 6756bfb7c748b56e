"""The settings of a recipe: strict, typed, frozen classes, one per section.

Units: lengths are in applied optimizer steps or epochs, KL in nats, batch sizes in sentences. Numbers of tokens include
the end-of-sentence token.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from vae_ds.config.data_settings import DataConfig, Settings
from vae_ds.config.logging_settings import LoggingConfig, ProfileConfig
from vae_ds.config.model_settings import ModelConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SCHEDULES = ("constant", "linear", "cyclical", "target")


def _count_or_auto(value: Any) -> Any:
    # The union's own error would name its parts instead of the key.
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be a whole number of at least 1, or auto; found {value!r}")


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]


class BatchConfig(Settings):
    """The global batch and the buckets determine the optimization. The micro batch changes only the memory use.

    A rank's share of the global batch is cut into micro batches of similar lengths within both limits.
    """

    global_size: int = Field(64, alias="global", ge=1, description="sentences per optimizer step, on all ranks")
    micro: CountOrAuto = Field(
        "auto", description="most sentences per rank and forward pass; auto: as many as `batch.tokens` permits"
    )
    tokens: CountOrAuto = Field(
        "auto",
        description="most tokens per rank and forward pass: sentences times the longest, with padding; auto: no limit "
        "if `batch.micro` is a number, else by the GPU's memory, or without a GPU 64 sentences of `data.max_tokens`",
    )
    bucket_batches: int = Field(128, ge=1, description="length buckets: sort within this many global batches")


class ConstantBeta(Settings):
    schedule: Literal["constant"]
    value: float = Field(ge=0, description="weight of the KL")


class LinearBeta(Settings):
    """From `start` to `max`, then constant (paper, equation 6). Exactly one of the three lengths is set."""

    schedule: Literal["linear"]
    start: float = Field(0.0, ge=0, description="weight at the beginning")
    max: float = Field(1.0, ge=0, description="weight at the end")
    over_epochs: float | None = Field(None, gt=0, description="length of the rise in epochs")
    over_steps: int | None = Field(None, ge=1, description="length of the rise in applied steps")
    over_fraction: float | None = Field(None, gt=0, le=1, description="length of the rise as a fraction of this phase")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        return _exactly_one(self, "over_epochs", "over_steps", "over_fraction")


class CyclicalBeta(Settings):
    """Repeated cycles of zero, a linear ramp, and `max` (Fu et al. 2019)."""

    schedule: Literal["cyclical"]
    max: float = Field(1.0, ge=0, description="weight at the end of a ramp")
    cycles: int = Field(4, ge=1, description="number of cycles in this phase")
    zero: float = Field(0.5, ge=0, lt=1, description="fraction of a cycle with weight 0")
    ramp: float = Field(0.25, ge=0, le=1, description="fraction of a cycle with the ramp; the rest is at `max`")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.zero + self.ramp > 1:
            raise ValueError(f"`zero` + `ramp` is {self.zero + self.ramp:g}; the sum must be at most 1")
        return self


class TargetBeta(Settings):
    """Beta is controlled so that the raw KL of a step reaches `kl` nats. This is the only schedule with a state."""

    schedule: Literal["target"]
    kl: float = Field(gt=0, description="target KL in nats per sentence")
    start: float = Field(0.0, ge=0, description="initial weight")
    rate: float = Field(0.01, gt=0, description="change of beta per step at a relative KL error of 1")
    max: float = Field(1.0, gt=0, description="maximum weight")


BetaConfig = Annotated[ConstantBeta | LinearBeta | CyclicalBeta | TargetBeta, Field(discriminator="schedule")]


class FreeBits(Settings):
    """The KL threshold (docs/method.md). `nats: 0` turns it off."""

    mode: Literal["per_dim", "per_dim_batch", "total", "total_batch"] = Field(
        "per_dim", description="what the threshold applies to; a prior that is learned along needs `total_batch`"
    )
    nats: float = Field(
        0.0, ge=0, description="the threshold: per latent unit, or of the sum in modes `total`, `total_batch`; 0: off"
    )


class OptimizerConfig(Settings):
    """AdamW. The paper's recipes use `eps` 1e-3, which was chosen for a loss averaged over 256 positions."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of Adam's two moments")
    eps: float = Field(1e-8, gt=0, description="added to the square root of the second moment")
    new_weights_lr_factor: float = Field(
        1.0, gt=0, description="learning rate of the new weights (bottleneck, memory, prior), as a multiple of `lr`"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, not of layer norms and biases")
    clip: float = Field(0.0, ge=0, description="maximum gradient norm of the loss in nats per sentence; 0: no clipping")


class LearningRateConfig(Settings):
    """A linear warm-up from zero, then a constant rate, or a linear or cosine decay to `final` times the peak.

    The decay ends with the phase.
    """

    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="applied steps from 0 to the peak")
    final: float = Field(0.0, ge=0, le=1, description="final rate as a fraction of the peak")


class AggressiveConfig(Settings):
    """Encoder steps until the encoder converges, then one decoder step (He et al. 2019).

    The alternation ends when the mutual information stops rising.
    """

    inner_steps: int = Field(100, ge=1, description="maximum number of encoder steps before each decoder step")
    check_every: int = Field(
        10, ge=1, description="the encoder has converged if its mean loss over this many steps exceeds the mean before"
    )


class PhaseConfig(Settings):
    """One training phase (docs/method.md)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name in logs and curves")
    epochs: float | None = Field(None, gt=0, description="length in epochs; set either `epochs` or `steps`")
    steps: int | None = Field(None, ge=1, description="length in applied optimizer steps")
    freeze: tuple[str, ...] = Field(
        (), description="frozen groups (encoder, decoder, ...) or patterns of parameter names"
    )
    beta: BetaConfig = ConstantBeta(schedule="constant", value=1.0)
    free_bits: FreeBits = FreeBits()
    denoise: float = Field(0.0, ge=0, lt=1, description="probability of deleting a token of the encoder's input")
    sample_posterior: bool = Field(True, description="sample z; false: z = mu, a deterministic autoencoder")
    aggressive: AggressiveConfig | None = Field(None, description="null: every step updates the whole model")
    reset_decoder: bool = Field(False, description="start the phase with the decoder weights of the base model")
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        return _exactly_one(self, "epochs", "steps")


class ValidationConfig(Settings):
    every_steps: int = Field(500, ge=1, description="applied steps between validations; a phase also ends with one")
    sentences: int = Field(2000, ge=2, description="use the first N sentences of the valid split")
    yardstick: str | None = Field(
        None, description="run of a plain language model, evaluated on valid: the cost of the code at each validation"
    )


class CheckpointConfig(Settings):
    every_steps: int = Field(1000, ge=1, description="applied steps between checkpoints; a phase also ends with one")
    every_minutes: float | None = Field(
        None, gt=0, description="also write one this many minutes after the start of the last one"
    )
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_best: Literal["nelbo", "rec", "mi", "z_gain"] | None = Field(
        None, description="also keep the checkpoint with the best validation: nelbo, rec, mi or z_gain"
    )


class TimeoutConfig(Settings):
    """When a run of several ranks is aborted, with the name of the rank, instead of waiting forever."""

    silent_s: float = Field(60.0, gt=0, description="abort after this many seconds without a heartbeat from a rank")
    stalled_s: float = Field(1800.0, gt=0, description="abort after this many seconds without progress of any rank")


class EvaluationConfig(Settings):
    """Settings of the costly metrics (docs/metrics.md). Each is reported with its number of sentences or samples."""

    iw_samples: int = Field(100, ge=1, description="K, importance samples per sentence")
    iw_sentences: int | None = Field(
        10_000, ge=1, description="sentences for `iw_nll`, the first of the split; null: the whole split"
    )
    mi_sentences: int | None = Field(
        10_000, ge=2, description="sentences for `mi` and `mi_train`, drawn at random; null: the whole split"
    )
    mi_train_sentences: int | None = Field(
        50_000, ge=0, description="training sentences for `mi_train`, drawn at random; 0 or null: no `mi_train`"
    )
    batch: int = Field(128, ge=1, description="most sentences, or importance samples, per forward pass and rank")
    tokens: CountOrAuto = Field(
        "auto", description="most tokens per forward pass and rank, with padding; auto: 2 GiB of float32 logits"
    )
    bleu_sentences: int | None = Field(256, ge=0, description="sentences to reconstruct for `bleu`; 0 or null: none")
    samples: int | None = Field(256, ge=0, description="prior samples for the text metrics; 0 or null: none")
    sample_temperature: float | None = Field(1.0, gt=0, description="temperature of the prior samples; null: greedy")
    mauve: str | None = Field(
        None, description="features of `mauve`: `base` (the encoder of the base) or a GPT-2 or BERT; null: no `mauve`"
    )


class RunConfig(Settings):
    """A whole training run. `vae-ds recipes show NAME` prints a shipped recipe."""

    schema_version: Literal[1] = Field(1, description="version of this file format")
    name: str = Field("run", description="name of the run; the default run directory is runs/NAME")
    seed: int = Field(0, ge=0, description="random seed of the order, the noise, the samples and the new weights")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    precision: Precision = Field("auto", description="number format (auto: bf16 on GPUs with native bf16, else fp32)")
    deepspeed: str = Field("zero1", description="a ZeRO stage (zero0 to zero3), a shipped ds_config, or a JSON file")
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig | None = Field(None, description="profile some steps of each phase; null: none")
    timeouts: TimeoutConfig = TimeoutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: Literal["best", "last"] = Field(
        "best", description="weights in model/ (best: lowest nelbo of the last phase at its final beta, if z is used)"
    )
    max_skipped_steps: int = Field(50, ge=1, description="the run fails after this many skipped steps in a row")

    @model_validator(mode="after")
    def _unique_phases(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ; found {', '.join(names)}")
        return self


class ArchitectureConfig(Settings):
    """A new T5 for `vae-ds pretrain`. The names are those of transformers' T5Config."""

    vocab_size: int = Field(4000, ge=300, description="SentencePiece pieces, without the 100 sentinels")
    d_model: int = Field(128, ge=8)
    d_kv: int = Field(32, ge=4)
    d_ff: int = Field(512, ge=8)
    num_layers: int = Field(4, ge=1)
    num_decoder_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    dropout_rate: float = Field(0.0, ge=0, lt=1)
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class PretrainConfig(Settings):
    """Pretraining of a T5 from scratch. Each example is span corruption, denoising or prefix language modelling."""

    schema_version: Literal[1] = 1
    name: str = "pretrain"
    seed: int = Field(0, ge=0)
    architecture: ArchitectureConfig = ArchitectureConfig()
    data: DataConfig = DataConfig()
    paragraphs: bool = Field(True, description="docstrings: also train on whole paragraphs, without valid and test")
    span_corruption: float = Field(0.3, ge=0, le=1, description="fraction of the examples")
    noise_density: float = Field(0.15, gt=0, lt=1, description="span corruption: fraction of the tokens to replace")
    mean_span: float = Field(3.0, ge=1, description="span corruption: mean length of a span in tokens")
    denoising: float = Field(0.0, ge=0, le=1, description="fraction of the examples; the rest is prefix LM")
    deletion: float = Field(0.15, ge=0, lt=1, description="denoising: fraction of the tokens to delete")
    empty_prefix: float = Field(0.5, ge=0, le=1, description="fraction of the prefix LM examples without a prefix")
    batch: BatchConfig = BatchConfig()
    steps: int = Field(1000, ge=1)
    minutes: float | None = Field(None, gt=0, description="end after this training time, if it comes before `steps`")
    precision: Precision = "auto"
    deepspeed: str = "zero1"
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig(schedule="cosine", warmup_steps=100)
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    max_skipped_steps: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.span_corruption + self.denoising > 1:
            raise ValueError(f"`span_corruption` + `denoising` is {self.span_corruption + self.denoising:g}; at most 1")
        if self.batch.tokens != "auto":
            raise ValueError("`batch.tokens` works only for VAEs: in pretraining, use `batch.micro`")
        if self.data.streaming:
            raise ValueError("`data.streaming` works only for VAEs: pretraining shuffles the whole text in each epoch")
        if self.checkpoint.keep_best is not None:
            raise ValueError("`checkpoint.keep_best` works only for VAEs: pretraining does not compute these metrics")
        if self.optimizer.new_weights_lr_factor != 1.0:
            raise ValueError(
                "`optimizer.new_weights_lr_factor` works only for VAEs: in pretraining all weights are new"
            )
        return self


class VariantConfig(Settings):
    """A run of a study in addition to its grid."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", description="name of the run and of its directory")
    recipe: str | None = Field(None, description="null: the recipe of the study")
    set: dict[str, Any] = Field({}, description="settings that differ from the recipe: dotted key, value")


class StudyConfig(Settings):
    """Many runs of one recipe: every combination of a grid, and the variants, each of them once per seed."""

    schema_version: Literal[1] = 1
    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", description="runs/NAME/ contains the runs")
    recipe: str = Field(description="a shipped recipe, or a YAML file")
    set: dict[str, Any] = Field({}, description="settings of every run: dotted key, value")
    grid: dict[str, list[Any]] = Field({}, description="dotted key, values: every combination is a run")
    variants: list[VariantConfig] = Field([], description="further runs, by name")
    seeds: list[int] = Field([0], min_length=1, description="each run is repeated with each seed")
    length: float = Field(1.0, gt=0, description="factor for all lengths in epochs")
    yardstick: str | None = Field(None, description="the variant that is a plain language model, for `lm_gain`")


# One word in a batch file or an argument of sbatch: no white space and no invisible characters.
Word = Annotated[str, Field(pattern=r"^[!-~]+$")]


class SiteConfig(Settings):
    """The settings that a cluster needs for every job, in one small file for `vae-ds submit`."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    memory: Word | None = Field(None, description="memory per node (sbatch --mem)")
    cpus_per_task: int | None = Field(None, ge=1, description="cores per rank")
    options: list[Word] = Field([], description="further sbatch options, such as --exclusive")
    modules: list[Word] = Field([], description="modules for `module load`")
    container: Word | None = Field(
        None, description="an Apptainer image (.sif), or an image for srun's --container-image (pyxis)"
    )
    container_mounts: list[Word] = Field([], description="SOURCE:TARGET, directories that the container sees")
    python: Word | None = Field(
        None, description="Python with vae_ds; null: `python` of the container, or else the Python of the launchers"
    )
    interface: Word | None = Field(None, description="network interface between nodes, such as ib0")
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        {}, description="environment variables of every rank"
    )


def _exactly_one(settings: Any, *names: str) -> Any:
    given = [name for name in names if getattr(settings, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"state exactly one of {', '.join(names)}; found {found}")
    return settings
