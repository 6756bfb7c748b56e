"""Probes: accuracies that are known, errors paired by text, texts of runs and files, and what can be missing."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from support import tiny
from vae_ds import cli, config
from vae_ds.config import DataConfig, RunConfig
from vae_ds.data import corpora
from vae_ds.errors import ConfigError, DataError
from vae_ds.inspection import Labelled, probes, targets
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:150])


def thing(text: str) -> str:
    return next(word for word in tiny.THINGS if word in text)


def test_what_a_classifier_can_and_cannot_read() -> None:
    random = np.random.default_rng(0)
    classes_N = np.array(["a", "b", "c"])[random.integers(3, size=300)]
    told_NL = np.stack([classes_N == "a", classes_N == "b"], 1) + 0.1 * random.standard_normal((300, 2))
    assert probes.correct(1e4 * told_NL, classes_N).mean() == 1
    assert probes.correct(random.standard_normal((300, 2)), classes_N).mean() == pytest.approx(1 / 3, abs=0.12)
    # A classifier that saw its test texts would know all of these by heart.
    assert probes.correct(random.standard_normal((300, 200)), classes_N).mean() < 0.5
    words_N = np.array([f"x {name} y {number}" for number, name in enumerate(classes_N)], dtype=object)
    assert probes.correct(words_N, classes_N).mean() == 1  # words of one letter count


def test_probes_stand_beside_their_baselines(vae: TextVAE) -> None:
    labelled = targets.with_form(Labelled(TEXTS, {"label": [thing(text) for text in TEXTS], "one": ["x"] * 150}))
    found = {one.target: one for one in probes.probe(vae, labelled)}
    assert set(found) == {"label", "length", "first word"}
    label = found["label"]
    assert (label.texts, label.classes) == (150, 6)
    assert label.accuracy["bag_of_words"] == 1
    assert label.majority < label.accuracy["mu"] < 1
    assert label.accuracy["t5"] > label.majority
    share = label.accuracy["mu"]
    assert label.accuracy_se["mu"] == pytest.approx(math.sqrt(share * (1 - share) / 149))
    assert label.above["bag_of_words"] == pytest.approx(share - 1)
    # Paired: where the other is always right, the error of the difference is that of the accuracy.
    assert label.above_se["bag_of_words"] == pytest.approx(label.accuracy_se["mu"])
    assert "| label | 150 | 6 |" in probes.table(list(found.values()))


def test_without_its_base_a_model_has_one_baseline(vae: TextVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = vae.model.settings.model_copy(update={"base": "/no/such/base"})
    monkeypatch.setattr(vae.model, "settings", gone)
    with pytest.warns(UserWarning, match="no baseline of the T5: .*/no/such/base"):
        assert set(probes.features(vae, TEXTS[:3])) == {"mu", "bag_of_words"}


def test_the_form_of_texts() -> None:
    texts = [" ".join(["word"] * count) for count in (1, 2, 2, 3, 3, 3, 4, 5, 9, 9)]
    found = targets.with_form(Labelled(texts))
    assert len(set(found.targets["length"])) <= targets.BINS
    assert found.targets["length"][-1] == found.targets["length"][-2]
    assert found.targets["length"][0] == "1 to 2 words"
    assert set(found.targets["first word"]) == {"word"}


def test_rare_values_share_a_class() -> None:
    values = ["a"] * 30 + ["b"] * 12 + ["c"] * 6 + ["d"] * 5 + [None] * 4
    rows, named = targets.classes(values)
    assert (len(rows), sorted(set(named))) == (53, [targets.OTHER, "a", "b"])
    rows, named = targets.classes(values[:48])
    assert (len(rows), sorted(set(named))) == (42, ["a", "b"])  # six texts are no class


def test_a_sample_of_a_file_is_uniform_and_seeded(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("".join(f"{row % 2}\ttext {row}\n" for row in range(200)))
    read = {"labelled": True, "most": 50}
    found = targets.of_file(tmp_path / "all.txt", **read)
    numbers = [int(text.split()[1]) for text in found.texts]
    assert numbers == sorted(set(numbers))
    assert min(numbers) < 40 < 160 < max(numbers)
    assert [int(label) for label in found.labels] == [number % 2 for number in numbers]
    assert targets.of_file(tmp_path / "all.txt", **read, seed=1).texts != found.texts
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        targets.of_file(tmp_path / "nothing.txt")


@pytest.mark.timeout(400)
def test_the_command_on_a_run_of_the_grammar(vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    vae.save_pretrained(run / "model")
    data = DataConfig(corpus="grammar", sentences={"train": 20, "valid": 20, "test": 120})
    recipe = config.load(RunConfig, "demo").model_copy(update={"data": data})
    (run / "config.yaml").write_text(config.dump(recipe))
    assert cli.run(["probe", str(run), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [one["target"] for one in found["probes"]]
    assert {"tense", "number", "negation", "length", "first word"} <= set(names)
    assert set(found["disentanglement"]["scores"]) == {
        "mig", "disentanglement", "completeness", "informativeness", "sap",
    }  # fmt: skip
    assert found["model"] == vae.fingerprint
    whole = targets.of_run(run, "test")
    assert whole.targets["tense"] == [corpora.grammar.factors(text)["tense"] for text in whole.texts]
    assert len(targets.of_run(run, "test", 30).texts) == 30


def test_the_command_on_labels_of_a_file(vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae.save_pretrained(tmp_path / "model")
    rows = [f'{thing(text)},"{text}"' for text in TEXTS]
    (tmp_path / "all.csv").write_text("\n".join(["thing,text", *rows, ""]))
    words = ["probe", str(tmp_path / "model"), "--device", "cpu"]
    assert cli.run([*words, "--labels", str(tmp_path / "all.csv"), "--label-column", "thing"]) == 0
    told = capsys.readouterr()
    assert "| label | 150 | 6 |" in told.out
    assert cli.run(words) == 2
    assert "is an exported model, which has no texts of its own; give --labels FILE" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("a\tone text\nb\ttwo texts\n")
    assert cli.run([*words, "--labels", str(tmp_path / "few.txt")]) == 2
    assert "no target of the 2 texts has two classes of 10 texts" in capsys.readouterr().err
    assert cli.run([*words, "--labels", str(tmp_path / "few.txt"), "--label-column", "x"]) == 2
    assert "few.txt: has no columns" in capsys.readouterr().err


def test_scikit_learn_may_be_missing(vae: TextVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r'needs the package scikit-learn .*pip install "vae_ds\[look\]"'):
        probes.probe(vae, Labelled(TEXTS, {"label": TEXTS}))
