"""An export in plain transformers: `AutoModel.from_pretrained(DIR)`, with or without vae_ds.

With vae_ds, `VaeDsModel` is registered for the `model_type` of exports. Without it, `trust_remote_code=True` loads the
same classes from a file of the export, which needs torch and transformers only (auto_code.py).

Shapes: B sentences, T tokens, L latent units.
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import cached_file

from vae_ds.model.bases import FAMILIES, tie
from vae_ds.model.bottleneck import Bottleneck
from vae_ds.model.injection import MemoryMlp, guard_half, inject
from vae_ds.model.prior import Prior, make_prior
from vae_ds.model.t5vae import T5VAE


@dataclass
class Posterior(ModelOutput):
    """What `VaeDsModel` returns: the mean and the log variance of the posterior, (B, L), float32."""

    mu: Tensor | None = None
    logvar: Tensor | None = None


class VaeDsConfig(PreTrainedConfig):
    """`config.json` of an export: `model`, the settings of the VAE, and `t5`, the configuration of its T5."""

    model_type = "vae_ds"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        t5: dict[str, Any] | None = None,
        aliases: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.t5, self.aliases = dict(model or {}), dict(t5 or {}), dict(aliases or {})
        super().__init__(**kwargs)


class VaeDsModel(PreTrainedModel):
    """A T5 whose decoder reads the encoder only through z. `encode` and `generate` are those of `vae_ds.T5VAE`."""

    config_class = VaeDsConfig
    base_model_prefix = "vae"

    # One implementation: the file in the export has the text of these methods.
    encode, reconstruction, generate = T5VAE.encode, T5VAE.reconstruction, T5VAE.generate
    token_losses, _memory, _is_divided, _cache = T5VAE.token_losses, T5VAE._memory, T5VAE._is_divided, T5VAE._cache

    def __init__(self, config: VaeDsConfig) -> None:
        super().__init__(config)
        kind = FAMILIES[config.t5["model_type"]]
        t5 = kind[1](kind[0].from_dict(dict(config.t5)))
        settings: Any = SimpleNamespace(**config.model)
        self.settings = settings
        plain = settings.injection == "none"
        self.latent_dim = 0 if plain else settings.latent_dim
        # transformers builds the model on the meta device, which has no random numbers. These layers are small.
        with torch.device("cpu"):
            generator = torch.Generator()
            self.bottleneck = None if plain else Bottleneck(t5.config.d_model, settings, generator)
            inject(t5, settings, generator)
            self.memory_mlp = None
            if settings.memory_mlp and not plain:
                self.memory_mlp = MemoryMlp(settings.latent_dim, settings.memory_mlp, generator)
        guard_half(t5)
        # The T5 would pass on the ties of its class. Those of an export are `aliases`.
        t5.all_tied_weights_keys = {}
        self.t5 = t5
        tie(t5, head="t5.lm_head.weight" in config.aliases)
        self.post_init()

    @torch.no_grad()
    def sample_codes(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` codes z ~ p(z) for `generate`: (count, L), float32. `generator` is one of the CPU.

        A learned prior is in a file of its own, which the first call reads. Raises OSError if it is missing.
        """
        eps_BL = torch.randn(count, self.latent_dim, generator=generator)
        choice_B = torch.rand(count, generator=generator)
        prior = self._prior
        return (eps_BL if prior is None else prior.sample(eps_BL, choice_B)).to(self.device)

    @cached_property
    def _prior(self) -> Prior | None:
        """The learned prior, on the CPU; None for N(0, I). It is no submodule: its weights are in another file."""
        kind = getattr(self.settings, "prior", "normal")
        if kind == "normal":
            return None
        commit = getattr(self.config, "_commit_hash", None)
        path = cached_file(str(self.name_or_path), f"priors/{kind}.safetensors", revision=commit)
        with torch.device("cpu"):
            prior = make_prior(self.settings, torch.Generator())
        assert prior is not None
        weights = {name.removeprefix("prior."): tensor for name, tensor in load_file(str(path)).items()}
        prior.load_state_dict(weights)
        return prior

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The tied weights as the export names them."""
        return dict(self.config.aliases)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Posterior:
        """input_ids (B, T), attention_mask (B, T), 1 for real tokens: the posterior of each sentence."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mu_BL, logvar_BL = self.encode(input_ids, mask_BT)  # type: ignore[misc]  # a method of T5VAE
        return Posterior(mu=mu_BL, logvar=logvar_BL)


AutoConfig.register(VaeDsConfig.model_type, VaeDsConfig)
AutoModel.register(VaeDsConfig, VaeDsModel)
