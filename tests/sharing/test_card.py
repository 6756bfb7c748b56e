"""The model card of an export: valid metadata of the hub, what is known of the model, and nothing of the machine."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from support import ROOT, tiny
from support.models import UNITS, build
from vae_ds.config import RunConfig
from vae_ds.config import build as build_config
from vae_ds.errors import CheckpointError
from vae_ds.model import load_tokenizer
from vae_ds.sharing import Examples, write_card

METRICS: dict[str, Any] = {
    "split": "test",
    "sentences": 1234,
    "nelbo": 63.478,
    "nelbo_se": 0.66,
    "rec": 50.1,
    "rec_se": 0.6,
    "kl": 13.4,
    "kl_se": 0.05,
    "au": 31,
    "kl_per_dim": [0.4] * 32,
    "iw_nll": 61.8,
    "iw_nll_se": 2.3,
    "iw_sentences": 200,
    "iw_samples": 100,
    "bleu": None,
    "verdict": "unused KL",
    "verdict_reason": "the decoder ignores the code",
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "mine", load_tokenizer(tiny.base()))
    return tmp_path / "mine"


def recipe(path: Path, /, **data: Any) -> RunConfig:
    shipped = {
        "model": {"base": str(path / "a-base")},
        "data": {"corpus": "text", "path": str(path / "letters")} | data,
    }
    phases = [{"name": "full", "steps": 5, "beta": {"schedule": "constant", "value": 1}}]
    return build_config(RunConfig, shipped | {"name": "mine", "phases": phases}, "a recipe")


def test_the_card_has_what_is_known(export: Path, tmp_path: Path) -> None:
    examples = Examples(["A ``` text\nof two lines."], 3, [(-3.0, "Less."), (3.0, "More.")])
    language_model = {"nelbo": 60.1, "nelbo_se": 0.6, "split": "test", "sentences": 1234}
    write_card(export, recipe=recipe(tmp_path), evaluation=METRICS, language_model=language_model, examples=examples)
    text = (export / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "vae_ds"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"nelbo": 63.478, "iw_nll": 61.8}
    assert "| `nelbo` | 63.5 ± 0.7 | 60.1 ± 0.6 |" in text
    assert "| `au` | 31 of 32 |  |" in text
    assert "1,234 sentences of the split `test`; `iw_nll` and `iw_ppl`: 200 with 100 samples each" in text
    assert "the decoder ignores the code" in text
    assert "it should be: unused KL" in text
    assert "A ''' text of two lines." in text
    assert "other values of latent unit 3" in text
    assert "  3.00  More." in text
    assert f"| latent units | {UNITS} |" in text
    assert "`letters`" in text
    assert "steps: 5" in text
    for place in (tmp_path, ROOT, Path(tiny.base())):
        assert str(place) not in text


def test_a_card_without_an_evaluation_says_so(export: Path) -> None:
    write_card(export)
    text = (export / "README.md").read_text(encoding="utf-8")
    assert "Not evaluated yet" in text
    assert ModelCard(text).data.eval_results is None


def test_names_of_the_hub_are_metadata(export: Path, tmp_path: Path) -> None:
    description = (export / "config.json").read_text(encoding="utf-8").replace(tiny.base(), "google-t5/t5-small")
    (export / "config.json").write_text(description, encoding="utf-8")
    write_card(export, recipe=recipe(tmp_path, corpus="dataset", path="someone/letters"), evaluation=METRICS)
    data = ModelCard((export / "README.md").read_text(encoding="utf-8")).data
    assert data.base_model == "google-t5/t5-small"
    assert data.datasets == "someone/letters"
    assert data.eval_results[0].dataset_type == "someone/letters"


def test_a_language_model_has_a_card(tmp_path: Path) -> None:
    build(injection="none").save_pretrained(tmp_path / "mine", load_tokenizer(tiny.base()), complete=write_card)
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "plain language model" in text
    assert "latent units" not in text


@pytest.mark.parametrize(
    ("prior", "words"), [("normal", "from N(0, I)."), ("flow", "from the learned prior (`flow`).")]
)
def test_samples_name_the_prior(prior: str, words: str, tmp_path: Path) -> None:
    build(prior=prior).save_pretrained(tmp_path / "mine", load_tokenizer(tiny.base()))
    write_card(tmp_path / "mine", examples=Examples(["A sample."]))
    assert f"z drawn {words}" in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    write_card(tmp_path / "mine", evaluation=METRICS)
    text = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert ("under the prior `normal`; the model now has the prior `flow`" in text) == (prior == "flow")


def test_only_an_export_has_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no exported model"):
        write_card(tmp_path)
    assert not list(tmp_path.iterdir())
