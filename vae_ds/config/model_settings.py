"""The settings of the model: the parts that are added to the pretrained T5 (docs/method.md)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from vae_ds.config.data_settings import Settings


class LoraConfig(Settings):
    """Low-rank adapters in the stacks of the T5 (Hu et al. 2021). They train in place of the stacks' own weights."""

    rank: int = Field(8, ge=1, description="rank of the adapters; without `model.lora`, there are none")
    alpha: int = Field(16, ge=1, description="an adapter is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the input of an adapter")
    where: Literal["both", "encoder", "decoder"] = Field("both", description="the stacks with adapters")
    modules: tuple[str, ...] = Field(
        ("q", "v"), min_length=1, description="the layers with adapters: q, k, v, o, wo, and wi or wi_0, wi_1"
    )


class ModelConfig(Settings):
    """The parts added to the pretrained T5 (docs/method.md)."""

    base: str = Field("tiny", description="`tiny` (shipped with the package), a hub name, or a directory")
    weights: str | None = Field(
        None,
        description="start from this trained VAE or language model, a run or an export, instead of the base's weights",
    )
    latent_dim: int = Field(32, ge=1, description="L, the number of latent units")
    pooling: Literal["max", "mean"] = Field("max", description="how the encoder states become one vector")
    pool_layers: Literal["last", "all"] = Field("last", description="encoder layers whose states are pooled")
    injection: Literal["cross_attention", "self_attention", "embedding", "self_attention+embedding", "none"] = Field(
        "cross_attention", description="how z enters the decoder"
    )
    slots: int = Field(
        1, ge=1, description="number of keys and values of z; above 1, `cross_attention` is the stock one over them"
    )
    memory_mlp: int = Field(
        0, ge=0, description="width of a network of z whose output the memory reads beside z; 0: none"
    )
    prior: Literal["normal", "gaussian", "mixture", "flow"] = Field(
        "normal", description="p(z): N(0, I), or learned: a full Gaussian, a mixture of Gaussians, a flow"
    )
    prior_components: int = Field(64, ge=1, description="prior `mixture`: number of components")
    prior_couplings: int = Field(8, ge=1, description="prior `flow`: number of affine coupling layers")
    prior_width: int = Field(64, ge=1, description="prior `flow`: width of the two hidden layers of a coupling")
    mu_std: float | None = Field(None, gt=0, description="initial std of W_mu; null: 1/sqrt(d_model)")
    logvar_std: float = Field(0.02, gt=0, description="initial std of W_logvar")
    memory_std: float | None = Field(None, gt=0, description="initial std of W_proj; null: 1/sqrt(its inputs)")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout rate; null: that of the base model")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _slots_have_an_attention(self) -> Self:
        if self.slots > 1 and self.injection == "embedding":
            raise ValueError(
                f"`slots` is {self.slots}, but injection `embedding` adds one vector; use `cross_attention` or "
                "`self_attention`"
            )
        return self

    @property
    def has_prior(self) -> bool:
        """Whether p(z) is learned. A plain language model has none."""
        return self.prior != "normal" and self.injection != "none"
