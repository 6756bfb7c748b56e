"""The settings of a recipe: strict, typed, frozen classes, one a section.

Units: lengths in applied optimizer steps or epochs, KL in nats, batches in sentences, tokens with the end-of-sentence.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPLITS = ("train", "valid", "test")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SCHEDULES = ("constant", "linear", "cyclical", "target")


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values are frozen, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, validate_default=True)


class ModelConfig(Settings):
    """What is built around the pretrained T5 (README, The method)."""

    base: str = Field("tiny", description="`tiny` (ships with the package), a hub name, or a directory")
    latent_dim: int = Field(32, ge=1, description="L, the number of latent units")
    pooling: Literal["max", "mean"] = Field("max", description="how encoder states become one vector")
    pool_layers: Literal["last", "all"] = Field("last", description="which encoder states are pooled")
    injection: Literal["cross_attention", "self_attention", "embedding", "self_attention+embedding", "none"] = Field(
        "cross_attention", description="how z enters the decoder"
    )
    mu_std: float | None = Field(None, gt=0, description="initial std of W_mu; null: 1/sqrt(d_model)")
    logvar_std: float = Field(0.02, gt=0, description="initial std of W_logvar")
    memory_std: float | None = Field(None, gt=0, description="initial std of W_proj; null: 1/sqrt(latent_dim)")
    dropout: float | None = Field(None, ge=0, lt=1, description="null: the base model's own")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")


class DataConfig(Settings):
    """Where text comes from, and how much of a sentence is kept."""

    corpus: Literal["docstrings", "wordnet", "grammar", "text", "dataset", "ptb", "snli", "yahoo", "yelp"] = Field(
        "docstrings", description="the kind of source"
    )
    path: str | None = Field(
        None,
        description="text: a directory with train/valid/test.txt; dataset: hub name or dir; ptb, snli, yahoo, yelp:"
        " either kind of dir, null: the hub; wordnet: dir of data.noun, ...",
    )
    train: str | None = Field(None, description="text: the training file, if not in `path`")
    valid: str | None = Field(None, description="text: the validation file, if not in `path`")
    test: str | None = Field(None, description="text: the test file, if not in `path`")
    subset: str | None = Field(None, description="dataset: the configuration name on the hub")
    revision: str | None = Field(None, description="dataset: a branch, tag or commit on the hub; null: the newest")
    splits: dict[str, str] = Field(
        {"train": "train", "valid": "validation", "test": "test"}, description="dataset: its names of our splits"
    )
    column: str = Field("text", description="dataset, and text in csv, tsv, jsonl: the column that holds the text")
    labelled: bool = Field(False, description="text: each line is a label, a tab, and the text; the label is dropped")
    examples: bool = Field(False, description="wordnet: also the glosses' example sentences, each a sentence")
    sentences: dict[str, int] = Field(
        {"train": 40_000, "valid": 2_000, "test": 2_000}, description="grammar: sentences drawn for each split"
    )
    seed: int = Field(0, ge=0, description="grammar: of the sentences drawn")
    limit: int | None = Field(None, ge=1, description="use the first N sentences of each split")
    streaming: bool = Field(
        False, description="text: read the training file while it is trained on, without a pass over it before"
    )
    max_tokens: int = Field(64, ge=2, description="longest sentence in subword tokens, end-of-sentence included")
    cache_dir: str | None = Field(None, description="null: $VAE_DS_CACHE, else ~/.cache/vae_ds")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.corpus == "text" and not (self.path or (self.train and self.valid and self.test)):
            raise ValueError("corpus `text` needs `path`, or all of `train`, `valid` and `test`")
        if self.corpus == "dataset" and not self.path:
            raise ValueError("corpus `dataset` needs `path`: a hub name or a directory")
        if self.streaming and self.limit is not None:
            raise ValueError("`limit` counts sentences, which `streaming` does not; leave one out")
        if set(self.splits) - set(SPLITS):
            raise ValueError(f"`splits` maps our names {', '.join(SPLITS)}; found {', '.join(self.splits)}")
        if set(self.sentences) - set(SPLITS) or min(self.sentences.values(), default=1) < 1:
            raise ValueError(f"`sentences` is a number from 1 for {', '.join(SPLITS)}; found {self.sentences}")
        return self


class BatchConfig(Settings):
    """The global batch decides the optimisation; the micro batch only decides memory."""

    global_size: int = Field(64, alias="global", ge=1, description="sentences an optimizer step")
    micro: int | Literal["auto"] = Field("auto", description="sentences a rank and forward pass")
    bucket_batches: int = Field(32, ge=1, description="length buckets: sort within this many global batches")


class ConstantBeta(Settings):
    schedule: Literal["constant"]
    value: float = Field(ge=0, description="the weight of the KL")


class LinearBeta(Settings):
    """From `start` to `max`, then constant (paper, equation 6). State one of the three lengths."""

    schedule: Literal["linear"]
    start: float = Field(0.0, ge=0, description="the weight at the beginning")
    max: float = Field(1.0, ge=0, description="the weight at the end")
    over_epochs: float | None = Field(None, gt=0, description="length in epochs")
    over_steps: int | None = Field(None, ge=1, description="length in applied steps")
    over_fraction: float | None = Field(None, gt=0, le=1, description="length as a part of this phase")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        return _exactly_one(self, "over_epochs", "over_steps", "over_fraction")


class CyclicalBeta(Settings):
    """Fu et al. 2019: each cycle is zero, then a linear ramp, then holds `max`."""

    schedule: Literal["cyclical"]
    max: float = Field(1.0, ge=0, description="the weight at the end of a ramp")
    cycles: int = Field(4, ge=1, description="cycles in this phase")
    zero: float = Field(0.5, ge=0, lt=1, description="part of a cycle at zero")
    ramp: float = Field(0.25, ge=0, le=1, description="part of a cycle that ramps; the rest holds `max`")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.zero + self.ramp > 1:
            raise ValueError(f"`zero` + `ramp` is {self.zero + self.ramp:g}; a cycle has only 1")
        return self


class TargetBeta(Settings):
    """Beta is steered so that the raw KL of a step reaches `kl` nats; the one schedule with state."""

    schedule: Literal["target"]
    kl: float = Field(gt=0, description="the wanted KL in nats per sentence")
    start: float = Field(0.0, ge=0, description="the first weight")
    rate: float = Field(0.01, gt=0, description="change of beta per step and relative KL error")
    max: float = Field(1.0, gt=0, description="the largest weight")


BetaConfig = Annotated[ConstantBeta | LinearBeta | CyclicalBeta | TargetBeta, Field(discriminator="schedule")]


class FreeBits(Settings):
    """KL thresholding (README, The method); `nats` 0 turns it off."""

    mode: Literal["per_dim", "per_dim_batch", "total"] = Field("per_dim", description="what the threshold is on")
    nats: float = Field(0.0, ge=0, description="lambda: per unit, or for the sum in mode `total`; 0: off")


class OptimizerConfig(Settings):
    """AdamW. `eps` 1e-8 but in the paper's recipes, whose 1e-3 was chosen for a loss averaged over 256 positions."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of Adam's two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(0.0, ge=0, description="largest gradient norm of the loss in nats a sentence; 0: no clipping")


class LearningRateConfig(Settings):
    """A warm-up from zero, then constant, linear or cosine decay to `final` times the peak at the phase's end."""

    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="the shape after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="applied steps from 0 to the peak")
    final: float = Field(0.0, ge=0, le=1, description="the last rate as a part of the peak")


class AggressiveConfig(Settings):
    """He et al. 2019: encoder steps until it has caught up, then one of the decoder, until MI stops rising."""

    inner_steps: int = Field(100, ge=1, description="most steps of the encoder before each step of the decoder")
    check_every: int = Field(10, ge=1, description="the encoder has caught up if so many steps' loss has not fallen")


class PhaseConfig(Settings):
    """One training phase (README, The method)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="as logs and curves show it")
    epochs: float | None = Field(None, gt=0, description="length in epochs, or")
    steps: int | None = Field(None, ge=1, description="length in applied steps")
    freeze: tuple[str, ...] = Field((), description="groups (encoder, decoder, ...) or patterns of parameter names")
    beta: BetaConfig = ConstantBeta(schedule="constant", value=1.0)
    free_bits: FreeBits = FreeBits()
    denoise: float = Field(0.0, ge=0, lt=1, description="probability that a token of the encoder's input is deleted")
    sample_posterior: bool = Field(True, description="false: z = mu, a deterministic autoencoder")
    aggressive: AggressiveConfig | None = Field(None, description="null: all of the model in every step")
    reset_decoder: bool = Field(False, description="start the phase with the base's decoder weights")
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        return _exactly_one(self, "epochs", "steps")


class ValidationConfig(Settings):
    every_steps: int = Field(500, ge=1, description="applied steps between validations; each phase's end is one too")
    sentences: int = Field(2000, ge=2, description="the first N sentences of the valid split")


class CheckpointConfig(Settings):
    every_steps: int = Field(1000, ge=1, description="applied steps between checkpoints; each phase's end is one too")
    every_minutes: float | None = Field(None, gt=0, description="also this long after the last one began")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: Literal["nelbo", "rec", "mi", "z_gain"] | None = Field(
        None, description="also keep the best by this metric of the validations, saved when it improves"
    )


class TimeoutConfig(Settings):
    """When a run of several ranks is given up, with the rank's name, rather than left to wait."""

    silent_s: float = Field(60.0, gt=0, description="seconds without a sign of life from a rank's process")
    stalled_s: float = Field(1800.0, gt=0, description="seconds in which no rank got any further")


class LoggingConfig(Settings):
    every: int = Field(10, ge=1, description="applied steps between rows of metrics.jsonl")
    tensorboard: bool = Field(True, description="write RUN/tensorboard")
    progress: bool = Field(True, description="a progress bar on the terminal")


class EvaluationConfig(Settings):
    """Settings of the README's costly metrics; the number of sentences or samples is reported beside each."""

    iw_samples: int = Field(100, ge=1, description="K, importance samples a sentence")
    iw_sentences: int | None = Field(None, ge=1, description="null: the whole split")
    batch: int = Field(128, ge=1, description="sentences, or importance samples, a forward pass and rank")
    bleu_sentences: int | None = Field(256, ge=0, description="sentences reconstructed for `bleu`; 0 or null: none")
    samples: int | None = Field(256, ge=0, description="prior samples for the metrics of text; 0 or null: none")
    sample_temperature: float | None = Field(
        1.0, gt=0, description="at which the samples' tokens are drawn; null: greedy"
    )


class RunConfig(Settings):
    """A whole training run. `vae-ds recipes show NAME` prints a shipped one."""

    schema_version: Literal[1] = Field(1, description="of this layout")
    name: str = Field("run", description="runs/NAME is the default run directory")
    seed: int = Field(0, ge=0, description="of the order, the noise, the samples and the new weights")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    precision: Precision = Field("auto", description="auto: bf16 on GPUs, fp32 on CPUs")
    deepspeed: str = Field("zero1", description="a ZeRO stage (zero0..zero3), a shipped ds_config's name, or a file")
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: Literal["best", "last"] = Field(
        "best", description="which weights become model/: best valid nelbo, or last"
    )
    max_skipped_steps: int = Field(50, ge=1, description="steps skipped in a row that end the run")

    @model_validator(mode="after")
    def _unique_phases(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ; found {', '.join(names)}")
        return self


class ArchitectureConfig(Settings):
    """A new T5 for `vae-ds pretrain`; names as in transformers' T5Config."""

    vocab_size: int = Field(4000, ge=300, description="SentencePiece pieces, the 100 sentinels not counted")
    d_model: int = Field(128, ge=8)
    d_kv: int = Field(32, ge=4)
    d_ff: int = Field(512, ge=8)
    num_layers: int = Field(4, ge=1)
    num_decoder_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    dropout_rate: float = Field(0.0, ge=0, lt=1)
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"


class PretrainConfig(Settings):
    """A T5 pretrained from nothing: span corruption, denoising and prefix language modelling, mixed by examples."""

    schema_version: Literal[1] = 1
    name: str = "pretrain"
    seed: int = Field(0, ge=0)
    architecture: ArchitectureConfig = ArchitectureConfig()
    data: DataConfig = DataConfig()
    paragraphs: bool = Field(True, description="docstrings: also train on whole paragraphs, valid and test taken out")
    span_corruption: float = Field(0.3, ge=0, le=1, description="part of the examples")
    noise_density: float = Field(0.15, gt=0, lt=1, description="span corruption: part of the tokens that is replaced")
    mean_span: float = Field(3.0, ge=1, description="span corruption: mean length of a span, in tokens")
    denoising: float = Field(0.0, ge=0, le=1, description="part of the examples; the rest is prefix LM")
    deletion: float = Field(0.15, ge=0, lt=1, description="denoising: part of the tokens that is deleted")
    empty_prefix: float = Field(0.5, ge=0, le=1, description="part of the prefix LM examples that are plain LM")
    batch: BatchConfig = BatchConfig()
    steps: int = Field(1000, ge=1)
    minutes: float | None = Field(None, gt=0, description="end after this training time if it comes before `steps`")
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
            raise ValueError(f"`span_corruption` + `denoising` is {self.span_corruption + self.denoising:g}; all is 1")
        if self.data.streaming:
            raise ValueError("`data.streaming` is for VAEs: a pretraining mixes the whole text anew each epoch")
        if self.checkpoint.keep_best is not None:
            raise ValueError("`checkpoint.keep_best` is for VAEs: a pretraining's validations have no such metric")
        return self


class VariantConfig(Settings):
    """A row of a study that stands beside its grid."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", description="also the run directory's")
    recipe: str | None = Field(None, description="null: the study's")
    set: dict[str, Any] = Field({}, description="the recipe's settings that differ: dotted key, value")


class StudyConfig(Settings):
    """Many runs of one recipe: every combination of a grid, variants beside it, and each of them once a seed."""

    schema_version: Literal[1] = 1
    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", description="runs/NAME/ holds the runs")
    recipe: str = Field(description="a shipped recipe, or a file")
    set: dict[str, Any] = Field({}, description="settings of every run: dotted key, value")
    grid: dict[str, list[Any]] = Field({}, description="dotted key, values: every combination is a run")
    variants: list[VariantConfig] = Field([], description="further runs, by name")
    seeds: list[int] = Field([0], min_length=1, description="each run once a seed")
    length: float = Field(1.0, gt=0, description="factor on all lengths in epochs")
    yardstick: str | None = Field(None, description="the variant that is a plain language model, for `lm_gain`")


# What may stand in a line of a batch file or as a word of sbatch: no white space and nothing unseen.
Word = Annotated[str, Field(pattern=r"^[!-~]+$")]


class SiteConfig(Settings):
    """What a cluster wants of every job; one small file for all of `vae-ds submit`."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    memory: Word | None = Field(None, description="sbatch's --mem: memory a node")
    cpus_per_task: int | None = Field(None, ge=1, description="cores a rank")
    options: list[Word] = Field([], description="further options of sbatch, such as --exclusive")
    modules: list[Word] = Field([], description="what `module load` loads")
    container: Word | None = Field(None, description="image for srun's --container-image (pyxis)")
    container_mounts: list[Word] = Field([], description="SOURCE:TARGET, for srun's --container-mounts")
    python: Word | None = Field(
        None, description="the Python that has vae_ds, if not the launchers' own; in a container"
    )
    interface: Word | None = Field(None, description="network interface between nodes, such as ib0")
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        {}, description="variables of every rank"
    )


def _exactly_one(settings: Any, *names: str) -> Any:
    given = [name for name in names if getattr(settings, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"state exactly one of {', '.join(names)}; found {found}")
    return settings
