"""T5VAE: a pretrained T5 with a Gaussian bottleneck between its encoder and its decoder (docs/method.md).

Shapes: B sentences, T tokens, H = d_model, L latent units, V vocabulary. All reports and losses are in nats.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from vae_ds.config import ModelConfig
from vae_ds.errors import CheckpointError
from vae_ds.model import auto_code, gaussian, lora
from vae_ds.model.bases import (
    EXPORT_FORMAT,
    EXPORT_VERSION,
    FAMILIES,
    check_base,
    is_export,
    load_t5,
    load_tokenizer,
    model_dir,
    read_export,
    save_tokenizer,
    tie,
)
from vae_ds.model.bottleneck import Bottleneck
from vae_ds.model.injection import MemoryMlp, guard_half, inject
from vae_ds.model.prior import make_prior
from vae_ds.model.prior_files import NORMAL, PREFIX, need_prior, read_prior, save_prior, with_prior
from vae_ds.model.token_losses import token_losses

__all__ = ["T5VAE", "Terms", "check_base", "load_tokenizer"]


class Terms(NamedTuple):
    """The result of one forward pass, float32, one row per sentence: `rec_B` and `kl_BL` in nats, and the posterior.

    `kl_BL` is the analytic KL to N(0, I).
    """

    rec_B: Tensor
    kl_BL: Tensor
    mu_BL: Tensor
    logvar_BL: Tensor


class PriorTerms(NamedTuple):
    """`Terms` of a model with a learned prior, and log q(z|x) and log p(z) of the sampled z."""

    rec_B: Tensor
    kl_BL: Tensor
    mu_BL: Tensor
    logvar_BL: Tensor
    log_q_B: Tensor
    log_p_B: Tensor


class T5VAE(nn.Module):
    """A T5 whose decoder reads the encoder only through z. Build it with `from_base` or `from_pretrained`.

    With injection `none` it is a plain language model: no encoder, `bottleneck` None, no memory, `latent_dim` 0.
    `prior` is None for N(0, I).
    """

    def __init__(self, t5: Any, settings: ModelConfig, generator: torch.Generator) -> None:
        """Changes the stock T5ForConditionalGeneration `t5` in place.

        New weights are drawn from `generator` only, those of the bottleneck first, those of a learned prior last: all
        others do not depend on it.
        """
        super().__init__()
        self.settings = settings
        plain = settings.injection == "none"
        self.bottleneck = None if plain else Bottleneck(t5.config.d_model, settings, generator)
        self.latent_dim = 0 if plain else settings.latent_dim
        inject(t5, settings, generator)
        guard_half(t5)
        if settings.lora is not None:
            lora.adapt(t5, settings.lora, generator)
        self.t5 = t5
        self.memory_mlp = None
        if settings.memory_mlp and not plain:
            self.memory_mlp = MemoryMlp(settings.latent_dim, settings.memory_mlp, generator)
        self.prior = None if plain else make_prior(settings, generator)
        if settings.gradient_checkpointing:
            # Newer releases of transformers 5 warn about the older name.
            enable = getattr(t5, "activation_checkpointing_enable", None) or t5.gradient_checkpointing_enable
            # Reentrant checkpointing gives different gradients if a part of the network is frozen.
            enable({"use_reentrant": False})

    @classmethod
    def from_base(cls, settings: ModelConfig, seed: int = 0) -> Self:
        """Build a model from `settings.base` (`tiny`, a directory or a hub name): float32, on the CPU, in eval mode.

        The new weights are a function of `seed` only. Raises ConfigError if the base cannot be used.
        """
        return cls(load_t5(settings), settings, torch.Generator().manual_seed(seed)).eval()

    @classmethod
    def mapped(cls, settings: ModelConfig, seed: int = 0) -> Self:
        """The model of `from_base` for whoever reads its weights once: those of the base are memory-mapped files.

        They have the dtype that the base is stored in, if it is one, and change with the files.
        """
        return cls(load_t5(settings, as_stored=True), settings, torch.Generator().manual_seed(seed)).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, prior: str | None = None) -> Self:
        """Load a run directory or an export: float32, on the CPU, in eval mode, with exactly the saved weights.

        `prior`: the kind of its priors to use, None for the one that the export names.
        Raises CheckpointError if the export is missing, broken or of another version, or has no such prior.
        """
        path = model_dir(path)
        export = read_export(path)
        try:
            settings = ModelConfig.model_validate(export["model"])
            family = FAMILIES[export["t5"]["model_type"]]
            aliases = set(export["aliases"])
        except (KeyError, TypeError, ValidationError) as error:
            raise CheckpointError(f"{path / 'config.json'}: not a complete vae_ds export: {error!r}") from None
        settings = with_prior(settings, path, prior)
        config = family[0].from_dict(dict(export["t5"]))
        with torch.device("meta"):
            t5 = family[1](config)
        model = cls(t5, settings, torch.Generator()).to_empty(device="cpu")
        tie(model.t5, head="t5.lm_head.weight" in aliases)
        _fill(model, path / "model.safetensors", read_prior(path, settings.prior) if model.prior is not None else {})
        return model.eval()

    def save_pretrained(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
        complete: Callable[[Path], None] | None = None,
    ) -> None:
        """Write an export: `config.json`, `model.safetensors` in float32, and the files of the tokenizer if given.

        `weights` replaces the weights of this module. For a partitioned module, pass whole parameters by name. Tied
        weights are stored once. Adapters are merged, so the export is a model without any; `adapters/` has them, too.
        A learned prior has a file of its own (prior_files.py).
        `notes` are further entries of `config.json`, plain data that loading ignores. `complete` may add files to the
        directory that it is given, which is the export before it has its name.
        The export is written to a temporary directory and renamed, so `path` never contains an
        incomplete export. An older export is replaced.
        Raises CheckpointError if `path` exists and is not an export or an empty directory.
        """
        path = Path(path)
        own = dict(self.named_parameters())
        tensors = dict(weights) if weights is not None else {name: tensor.detach() for name, tensor in own.items()}
        if tensors.keys() != own.keys():
            raise ValueError(f"weights must name each parameter once; differing: {sorted(tensors.keys() ^ own.keys())}")
        if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_export(path))):
            raise CheckpointError(f"{path}: exists and is not a vae_ds export; use another directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            fresh = Path(folder) / "fresh"
            fresh.mkdir()
            if tokenizer is not None:
                save_tokenizer(tokenizer, fresh)
            if self.settings.lora is not None:
                lora.save_adapters(fresh / lora.FOLDER, tensors, self.settings.lora, self.settings.base)
                tensors = lora.merged(tensors, self.settings.lora)
            if self.prior is not None:
                save_prior(fresh, self.settings, {name: tensors[name] for name in tensors if name.startswith(PREFIX)})
            stored = {
                name: tensor.to("cpu", torch.float32).contiguous()
                for name, tensor in tensors.items()
                if not name.startswith(PREFIX)
            }
            save_file(stored, fresh / "model.safetensors", metadata={"format": "pt"})
            text = json.dumps(self._description() | dict(notes or {}), indent=2, ensure_ascii=False)
            (fresh / "config.json").write_text(text + "\n", encoding="utf-8")
            (fresh / auto_code.CODE).write_text(auto_code.source(), encoding="utf-8")
            if complete is not None:
                complete(fresh)
            if path.exists():
                path.rename(Path(folder) / "old")
            fresh.rename(path)

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each (B, L), float32.

        `pool_layers: all` averages over `hidden_states[1:]` of transformers: the outputs of all encoder blocks, the
        last one after the final norm, without the embeddings.
        """
        if self.bottleneck is None:
            raise ValueError("a model with injection `none` has no encoder")
        every = self.settings.pool_layers == "all"
        # Given a mask (B, T), transformers waits for the device to learn whether all of it is true.
        whole = self.t5.config._attn_implementation == "sdpa"
        seen = attention_mask_BT.ne(0)[:, None, None, :] if whole else attention_mask_BT
        output = self.t5.encoder(
            input_ids=input_ids_BT, attention_mask=seen, output_hidden_states=every, return_dict=True
        )
        states = output.hidden_states[1:] if every else (output.last_hidden_state,)
        mu_BL, logvar_BL = self.bottleneck(states, attention_mask_BT)
        return mu_BL, logvar_BL

    def reconstruction(self, z_BL: Tensor | None, labels_BT: Tensor) -> Tensor:
        """rec = - sum_t log p(x_t | x_<t, z) over the tokens of a sentence with its end: (B,), float32, nats.

        `labels_BT` is padded with -100. z is None for injection `none`. The logits are computed as in the stock T5.

        They are the largest tensor. Without a gradient, only a part of them is in memory at a time, and with gradient
        checkpointing, too, where they are computed twice.
        """
        return self.token_losses(z_BL, labels_BT).sum(1)

    def token_losses(self, z_BL: Tensor | None, labels_BT: Tensor) -> Tensor:
        """The terms of `reconstruction`, - log p(x_t | x_<t, z) of each token: (B, T), 0 where there is none."""
        decoder_output = self.t5.decoder(
            input_ids=self.t5.prepare_decoder_input_ids_from_labels(labels_BT),
            encoder_hidden_states=self._memory(z_BL, len(labels_BT), labels_BT.device),
            use_cache=False,
        )
        in_parts = self.settings.gradient_checkpointing or not torch.is_grad_enabled()
        return token_losses(self.t5, decoder_output.last_hidden_state, labels_BT, in_parts)

    def log_prior(self, z_BL: Tensor) -> Tensor:
        """log p(z), shape (B,), in nats: in the dtype of z for N(0, I), else float32."""
        return gaussian.log_prior(z_BL) if self.prior is None else self.prior.log_prob(z_BL)

    def draw_codes(self, eps_BL: Tensor, choice_B: Tensor) -> Tensor:
        """Codes z ~ p(z), shape (B, L), from eps ~ N(0, I) and `choice_B`, uniform in [0, 1). N(0, I) gives eps."""
        return eps_BL if self.prior is None else self.prior.sample(eps_BL, choice_B)

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        labels_BT: Tensor | None,
        eps_BL: Tensor,
        prior_pull: float = 1.0,
    ) -> Terms | PriorTerms:
        """One pass: encode, z = mu + exp(logvar / 2) eps, decode. eps 0 gives z = mu. Without labels, rec is 0.

        prior_pull: factor of the gradient of log p(z) by z, for a learned prior. That by the prior's weights has none.

        The posterior and z are computed in float32 without autocast. z is cast to the dtype of the decoder at its
        injection. With injection `none` no encoder runs, eps is ignored, and kl, mu and logvar have shape (B, 0).
        """
        if self.bottleneck is None:
            if labels_BT is None:
                raise ValueError("a model with injection `none` needs labels")
            nothing_B0 = eps_BL.new_zeros(len(labels_BT), 0, dtype=torch.float32)
            return Terms(self.reconstruction(None, labels_BT), nothing_B0, nothing_B0, nothing_B0)
        mu_BL, logvar_BL = self.encode(input_ids_BT, attention_mask_BT)
        with torch.autocast(mu_BL.device.type, enabled=False):
            z_BL = gaussian.sample(mu_BL, logvar_BL, eps_BL.float())
            kl_BL = gaussian.kl_per_dim(mu_BL, logvar_BL)
        rec_B = z_BL.new_zeros(len(z_BL)) if labels_BT is None else self.reconstruction(z_BL, labels_BT)
        if self.prior is None:
            return Terms(rec_B, kl_BL, mu_BL, logvar_BL)
        with torch.autocast(mu_BL.device.type, enabled=False):
            log_q_B = gaussian.log_density_of_sample(logvar_BL, eps_BL.float())
            still_BL = z_BL.detach()
            log_p_B = self.prior.log_prob(still_BL + prior_pull * (z_BL - still_BL))
        return PriorTerms(rec_B, kl_BL, mu_BL, logvar_BL, log_q_B, log_p_B)

    def generate(
        self, z_BL: Tensor | None, max_new_tokens: int, batch_size: int | None = None, **generate_kwargs: Any
    ) -> Any:
        """Token ids (B, T) as from the stock `generate`, beginning with the decoder's start token; greedy by default.

        `generate_kwargs` are passed to the `generate` of transformers (`do_sample`, `num_beams`, ...).
        For injection `none`, pass z None and a `batch_size`.
        If ZeRO 3 divides the weights among ranks, this is a collective: each rank may have its own z, and runs the
        decoder until the longest text of all ranks is complete.
        """
        device = self.t5.shared.weight.device if z_BL is None else z_BL.device
        memory_B1L = self._memory(z_BL, batch_size, device)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "synced_gpus": self._is_divided()}
        options |= generate_kwargs
        own_cache = options.get("cache_implementation") in (None, "dynamic", "static")
        if own_cache and options.get("use_cache", True) and options.get("past_key_values") is None:
            options["past_key_values"] = self._cache(options.pop("cache_implementation", None), max_new_tokens + 1)
        return self.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory_B1L),
            attention_mask=torch.ones(len(memory_B1L), 1, dtype=torch.long, device=device),
            max_new_tokens=max_new_tokens,
            **options,
        )

    def _memory(self, z_BL: Tensor | None, batch_size: int | None, device: torch.device) -> Tensor:
        """z as encoder states for the decoder, (B, 1, L), or wider with `memory_mlp`.

        For injection `none`, zeros (B, 1, 1) that no layer reads.
        """
        if self.bottleneck is not None:
            if z_BL is None:
                raise ValueError("this model decodes from z; z may be None only for injection `none`")
            memory_B1L: Tensor = z_BL.unsqueeze(1)
            return memory_B1L if self.memory_mlp is None else self.memory_mlp(memory_B1L)
        if z_BL is not None and z_BL.shape[-1] > 0:
            raise ValueError("a model with injection `none` takes no z")
        size = batch_size if z_BL is None else len(z_BL)
        if size is None:
            raise ValueError("a model with injection `none` needs batch_size, because it has no z")
        return torch.zeros(size, 1, 1, device=device)

    def _is_divided(self) -> bool:
        """Whether ZeRO 3 divides the weights among several ranks. Each forward call is then a collective.

        transformers notices this only if DeepSpeed was set up through its own integration.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and any(hasattr(parameter, "ds_id") for parameter in self.parameters())

    def _cache(self, implementation: str | None, length: int) -> Cache:
        """A cache with the depth of the decoder; transformers 5 uses the depth of the encoder. No layer caches z."""
        if implementation == "static":
            return EncoderDecoderCache(StaticCache(config=self.t5.decoder.config, max_cache_len=length), DynamicCache())
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _description(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        every = self.named_parameters(remove_duplicate=False)
        settings = self.settings
        if self.prior is None:
            # Of a plain language model, whose recipe may ask for one.
            settings = settings.model_copy(update={"prior": NORMAL})
        return {
            "format": EXPORT_FORMAT,
            "schema_version": EXPORT_VERSION,
            # `weights` is where the training started, a path of the machine that trained. Adapters are merged.
            "model": settings.model_dump(mode="json", by_alias=True, exclude={"weights", "lora"}),
            # `_name_or_path` is a path of this machine.
            "t5": {key: value for key, value in self.t5.config.to_dict().items() if key != "_name_or_path"},
            **auto_code.entries("float32"),
            "aliases": {name: names[id(parameter)] for name, parameter in every if names[id(parameter)] != name},
        }


def exported_weights(path: str | Path, prior: str = NORMAL) -> dict[str, Tensor]:
    """The weights of a run directory or an export by name, with those of its prior `prior`.

    They are memory-mapped, in the dtype of the file.

    Raises CheckpointError if the export is missing, broken or of another version, or has no such prior.
    """
    path = model_dir(path)
    read_export(path)
    need_prior(path, prior)
    file = path / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            return found | read_prior(path, prior)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken: {error}") from None


def _fill(model: T5VAE, file: Path, prior: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a safetensors file, and those of a prior, to the parameters with the same names.

    Raises CheckpointError.
    """
    own = dict(model.named_parameters())
    try:
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            found = {*stored.keys(), *prior}
            if found != own.keys():
                differing = sorted(found ^ own.keys())
                raise CheckpointError(f"{file}: its tensors do not fit config.json: {', '.join(differing[:3])}")
            for name, parameter in own.items():
                tensor = prior[name] if name in prior else stored.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise CheckpointError(
                        f"{file}: {name} has shape {list(tensor.shape)}, but config.json needs {list(parameter.shape)}"
                    )
                parameter.copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or broken: {error}") from None
