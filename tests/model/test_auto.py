"""Exports in plain transformers: the same network, with vae_ds and without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from support import tiny
from support.models import UNITS, batch, build, latents
from vae_ds.model import T5VAE, VaeDsModel, auto_code, load_tokenizer

KINDS = {
    "t5": {"prior": "flow"},
    "v1_1": {"injection": "self_attention+embedding", "pooling": "mean", "prior": "gaussian"},
    "mt5": {"injection": "embedding", "pool_layers": "all"},
    "byt5": {"pool_layers": "all", "pooling": "mean", "prior": "mixture"},
}
# What the file of the export is for: a program without vae_ds.
ALONE = """
import sys
sys.modules["vae_ds"] = None
import torch
from transformers import AutoModel, AutoTokenizer
for kind, given in torch.load("given.pt").items():
    model, report = AutoModel.from_pretrained(kind, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    assert AutoTokenizer.from_pretrained(kind, trust_remote_code=True).eos_token_id == 1
    with torch.no_grad():
        mu, logvar = model.eval().encode(given["ids"], given["mask"])
        assert torch.equal(mu, model(given["ids"], given["mask"]).mu)
        made = {"mu": mu, "logvar": logvar, "text": model.generate(given["z"], 8)}
        made["rec"] = model.reconstruction(given["z"], given["labels"])
    made["codes"] = model.sample_codes(20, torch.Generator().manual_seed(1))
    assert "prior" not in " ".join(model.state_dict())
    torch.save(made, f"{kind}.pt")
"""


def expected(model: T5VAE, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        mu, logvar = model.encode(given["ids"], given["mask"])
        rec = model.reconstruction(given["z"], given["labels"])
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(20, UNITS, generator=random), torch.rand(20, generator=random)
    codes = {"codes": model.draw_codes(*noise).detach()}
    return {"mu": mu, "logvar": logvar, "rec": rec, "text": model.generate(given["z"], 8), **codes}


@pytest.mark.timeout(240)
def test_the_file_in_the_export_is_the_model_without_vae_ds(tmp_path: Path) -> None:
    models, given = {}, {}
    for kind, settings in KINDS.items():
        models[kind] = build(kind, **settings)
        for parameter in () if models[kind].prior is None else models[kind].prior.parameters():
            # A prior begins near N(0, I).
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        models[kind].save_pretrained(tmp_path / kind, load_tokenizer(tiny.base(kind)))
        rows = batch(kind)
        given[kind] = {"ids": rows["input_ids_BT"], "mask": rows["attention_mask_BT"], "labels": rows["labels_BT"]}
        given[kind]["z"] = latents()
    torch.save(given, tmp_path / "given.pt")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "tie" not in done.stderr
    for kind, model in models.items():
        made = torch.load(tmp_path / f"{kind}.pt")
        for name, value in expected(model, given[kind]).items():
            torch.testing.assert_close(made[name], value, rtol=0, atol=1e-5, msg=f"{kind} {name}")


def test_vae_ds_makes_its_exports_known(tmp_path: Path) -> None:
    """Without running code of the export: the class is that of the package. The dtype is that of the file."""
    for kind, injection in (("t5", "cross_attention"), ("v1_1", "cross_attention"), ("mt5", "none")):
        model = build(kind, injection=injection)
        model.save_pretrained(tmp_path / kind, load_tokenizer(tiny.base(kind)))
        (tmp_path / kind / auto_code.CODE).unlink()
        loaded, report = AutoModel.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert type(loaded) is VaeDsModel
        assert not any(report.values())
        stored = dict(model.named_parameters())
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, stored.pop(name)), name
        assert not stored
    assert AutoConfig.from_pretrained(tmp_path / "t5").model["latent_dim"] == UNITS


def test_an_export_names_no_directory_of_the_base_in_its_t5(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "mine")
    described = json.loads((tmp_path / "mine" / "config.json").read_text(encoding="utf-8"))
    assert tiny.base() not in json.dumps(described["t5"])
