"""A prior fitted to a finished run: what it reaches, what of the export changes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from support.recipes import write_recipe
from support.tiny import ENGLISH, make_base, write_splits
from vae_ds import latents
from vae_ds.cli import run as vae_ds_command
from vae_ds.config import ModelConfig, hub
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.evaluation import FitSettings, prior_fit
from vae_ds.model import T5VAE, gaussian, read_export, stored_priors
from vae_ds.textvae import TextVAE
from vae_ds.training import train

UNITS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training: its codes are far from N(0, I)."""
    folder = tmp_path_factory.mktemp("fit")
    base = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    recipe = write_recipe(
        folder,
        f"""
name: fit
model: {{base: {base}, latent_dim: {UNITS}, dropout: 0, mu_std: 0.5, logvar_std: 0.1}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: 16}}
precision: fp32
phases: [{{name: short, steps: 3, beta: {{schedule: constant, value: 0}}}}]
validation: {{every_steps: 100, sentences: 32}}
evaluation: {{iw_samples: 5, iw_sentences: 20, bleu_sentences: 0, samples: 4}}
""",
    )
    return train(str(recipe), folder / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of its own for a test that changes it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def command(*words: object) -> int:
    return vae_ds_command([str(word) for word in words])


# The fit itself, on codes whose density is known


def mixture_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of two clusters, correlated: no single Gaussian describes them."""
    generator = torch.Generator().manual_seed(3)
    side_M1 = torch.randint(2, (4000, 1), generator=generator) * 6.0 - 3.0
    noise_M2 = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    mu_M2 = torch.cat([side_M1, side_M1], 1) + 0.5 * noise_M2
    return mu_M2, torch.full((4000, 2), -3.0, dtype=torch.float64)


def nll(kind: str) -> float:
    """-log p(z) of new samples, nats, under a prior fitted to the codes."""
    mu_ML, logvar_ML = mixture_codes()
    settings = ModelConfig(latent_dim=2, prior=kind, prior_components=8, prior_couplings=4, prior_width=32)
    prior = prior_fit.fit(settings, (mu_ML, logvar_ML), FitSettings(kind, steps=600, batch=256, lr=5e-3))
    eps_ML = torch.randn(mu_ML.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return -prior.log_prob(gaussian.sample(mu_ML, logvar_ML, eps_ML)).mean().item()


def test_a_fit_reaches_the_entropy_of_the_codes() -> None:
    # Two clusters of variance 0.25 + exp(-3): ln 2 for the cluster, and twice the entropy of a Gaussian.
    variance = 0.25 + torch.tensor(-3.0).exp().item()
    entropy = torch.tensor(2.0).log().item() + torch.log(torch.tensor(2 * torch.pi * torch.e * variance)).item()
    assert nll("mixture") == pytest.approx(entropy, abs=0.05)
    assert entropy - 0.05 < nll("flow") < entropy + 0.3
    mu_ML, logvar_ML = mixture_codes()
    covariance_LL = mu_ML.T.cov(correction=0) + torch.diag(logvar_ML.exp().mean(0))
    gaussian_nll = 0.5 * torch.logdet(2 * torch.pi * torch.e * covariance_LL).item()
    assert nll("gaussian") == pytest.approx(gaussian_nll, abs=0.03)
    assert gaussian_nll > entropy + 0.5


def test_a_density_that_is_not_finite_ends_the_fit() -> None:
    settings = ModelConfig(latent_dim=2, prior="flow", prior_couplings=2, prior_width=8)
    with pytest.raises(ConfigError, match=r"^the density of the prior flow is not finite at step \d+; .* than 1e\+30$"):
        prior_fit.fit(settings, mixture_codes(), FitSettings("flow", steps=20, lr=1e30))
    broken = (torch.full((50, 2), torch.nan), torch.zeros(50, 2))
    with pytest.raises(ConfigError, match=r"^the codes of the training sentences are not finite"):
        prior_fit.fit(settings, broken, FitSettings("flow"))


# The command


def test_a_fitted_prior_is_added_and_used_and_the_old_one_can_be_chosen(run: Path, capsys) -> None:
    before = load_file(run / "model" / "model.safetensors")
    fingerprint = TextVAE.from_pretrained(run).fingerprint
    told = {}
    for kind in ("gaussian", "flow"):
        assert command("prior", run, "--kind", kind, "--steps", 150, "--couplings", 2, "--width", 8, "--json") == 0
        told[kind] = json.loads(capsys.readouterr().out)
    assert told["gaussian"]["kl"] < told["gaussian"]["kl_normal"] - 0.2
    assert told["flow"]["kl_before"] == pytest.approx(told["gaussian"]["kl"]), "the prior in use before"
    assert told["flow"]["saved"] == pytest.approx(told["flow"]["kl_normal"] - told["flow"]["kl"])
    assert (told["flow"]["sentences"], told["flow"]["held_out"]) == (300, 50)

    assert stored_priors(run / "model") == ["normal", "flow", "gaussian"]
    after = load_file(run / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    model = T5VAE.from_pretrained(run)
    assert (model.settings.prior, model.settings.prior_couplings, model.settings.prior_width) == ("flow", 2, 8)
    assert TextVAE.from_pretrained(run).fingerprint == fingerprint, "codes do not depend on the prior"
    assert T5VAE.from_pretrained(run, prior="gaussian").settings.prior == "gaussian"

    # What the hub sends of an export is a whole model: all but what people and plain transformers read.
    files = {str(file.relative_to(run / "model")) for file in (run / "model").rglob("*") if file.is_file()}
    files -= {"README.md", "modeling_vae_ds.py"}
    assert files == set(filter_repo_objects(files, allow_patterns=list(hub.EXPORT_FILES)))

    assert command("prior", run, "--use", "normal") == 0
    assert capsys.readouterr().out == f"{run / 'model'} uses the prior normal; it has normal, flow, gaussian\n"
    assert T5VAE.from_pretrained(run).prior is None
    assert read_export(run / "model")["origin"], "the rest of config.json stays"


def test_samples_and_metrics_use_the_prior(run: Path, capsys) -> None:
    assert command("prior", run, "--kind", "gaussian") == 0
    found = {}
    for kind in ("gaussian", "normal"):
        assert command("evaluate", run, "--prior", kind, "--json") == 0
        found[kind] = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The evaluation that is stored is the last one.
    stale = f"{run / 'eval-test.json'} is of another prior; `vae-ds evaluate {run} --split test` writes it anew\n"
    assert command("prior", run, "--use", "normal") == 0
    assert stale not in capsys.readouterr().out
    assert command("prior", run, "--use", "gaussian") == 0
    assert capsys.readouterr().out.endswith(stale)
    assert command("prior", run, "--kind", "gaussian", "--replace") == 0
    assert capsys.readouterr().out.endswith(stale)
    learned, plain = found["gaussian"], found["normal"]
    assert (learned["prior"], plain.get("prior"), plain.get("kl_normal")) == ("gaussian", None, None)
    assert learned["rec"] == plain["rec"]
    assert learned["kl_normal"] == plain["kl"]
    assert learned["nelbo"] == pytest.approx(learned["rec"] + learned["kl"])
    assert learned["kl"] < plain["kl"] - 0.2
    assert learned["iw_nll"] < plain["iw_nll"]
    assert learned["mi"] == plain["mi"]

    vae = TextVAE.from_pretrained(run)
    mean_L = vae.encode(ENGLISH[:100]).mean(0)
    eps_NL, choice_N = torch.randn(500, UNITS), torch.rand(500)
    with torch.no_grad():
        assert (vae.model.draw_codes(eps_NL, choice_N).mean(0) - mean_L).abs().max() < 0.5
    drawn = []
    original = latents.generate._decode

    def seen(model, tokenizer, z_NL, *rest):
        drawn.append(z_NL)
        return original(model, tokenizer, z_NL, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents.generate, "_decode", seen)
        vae.sample(40)
        TextVAE.from_pretrained(run, prior="normal").sample(40)
    learned_NL, normal_NL = drawn
    with torch.no_grad():
        assert torch.allclose(learned_NL, vae.model.draw_codes(normal_NL, torch.zeros(40)))
    assert not torch.allclose(learned_NL, normal_NL, atol=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use", "flow"], "model: no prior `flow`; it has normal, gaussian. `vae-ds prior RUN --kind flow` fits one"),
        (["--kind", "gaussian"], "model: has a prior `gaussian` already; --replace replaces it"),
        (
            ["--kind", "flow", "--sentences", "39"],
            "39 training sentences are too few for a prior of 4 latent units; use",
        ),
    ],
)
def test_what_a_run_cannot_have_is_one_line_and_changes_nothing(run: Path, capsys, words, message) -> None:
    assert command("prior", run, "--kind", "gaussian") == 0
    before = {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command("prior", run, *words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert message in told
    assert before == {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}


def test_a_prior_of_another_dimension_or_with_broken_weights_is_one_line(run: Path, tmp_path: Path, capsys) -> None:
    assert command("prior", run, "--kind", "gaussian") == 0
    file = run / "model" / "priors" / "gaussian.safetensors"
    good = file.read_bytes()
    settings = json.dumps(ModelConfig(latent_dim=7, prior="gaussian").model_dump(mode="json"))
    save_file({"prior.whitening.mean": torch.zeros(7)}, file, metadata={"settings": settings})
    with pytest.raises(CheckpointError, match="a prior of 7 latent units, but the model has 4; fit one to this model"):
        T5VAE.from_pretrained(run)
    file.write_bytes(good[:100])
    with pytest.raises(CheckpointError, match=r"gaussian\.safetensors: missing, broken or no prior of vae_ds"):
        T5VAE.from_pretrained(run)
    file.write_bytes(good)
    weights = load_file(file)
    told = json.dumps(T5VAE.from_pretrained(run).settings.model_dump(mode="json"))
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    save_file(broken, file, metadata={"settings": told})
    capsys.readouterr()
    for words in (["sample", run], ["logprob", run, "a text"]):
        assert command(*words, "--device", "cpu") == 2
        assert "the learned prior " in capsys.readouterr().err
    assert command("evaluate", run) == 2
    assert "the learned prior has no finite density for 50 of 50 codes; fit it again" in capsys.readouterr().err
