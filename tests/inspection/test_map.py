"""Maps, grids, z_gain by position, the projector's files, and texts of a label."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support import tiny
from vae_ds import cli
from vae_ds.errors import ConfigError, DataError
from vae_ds.inspection import Labelled, by_label, maps, pictures, positions, targets
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:40])


def test_pca_finds_the_directions_of_the_largest_variance() -> None:
    random = np.random.default_rng(0)
    turn_LL = np.linalg.qr(random.standard_normal((4, 4)))[0]
    z_NL = (random.standard_normal((3000, 4)) * [3, 2, 0.1, 0.1]) @ turn_LL.T + 7
    plane = maps.pca(z_NL)
    np.testing.assert_allclose(plane.xy_N2.std(0), [3, 2], rtol=0.05)
    np.testing.assert_allclose(plane.xy_N2.mean(0), 0, atol=1e-9)
    centred_N2 = (z_NL - z_NL.mean(0)) @ turn_LL[:, :2]
    assert np.abs(np.corrcoef(plane.xy_N2[:, 0], centred_N2[:, 0])[0, 1]) > 0.99
    assert plane.axes[0] == "principal component 1 (69 % of the variance)"
    assert np.array_equal(maps.pca(z_NL).xy_N2, plane.xy_N2)
    for z in (z_NL[:1], z_NL[:, :1]):
        with pytest.raises(DataError, match="needs two texts and two latent units"):
            maps.pca(z)


@pytest.mark.timeout(600)
def test_umap_keeps_neighbours_together() -> None:
    """Two groups that lie apart stay apart; the seed decides the map; a few texts are enough."""
    groups_N = np.arange(60) % 2
    z_NL = np.random.default_rng(0).standard_normal((60, 4)) + 12 * groups_N[:, None]
    plane = maps.umap(z_NL, seed=3)
    assert plane.axes == ("UMAP 1", "UMAP 2")
    far_NN = np.linalg.norm(plane.xy_N2[:, None] - plane.xy_N2[None], axis=-1)
    is_same_NN = groups_N[:, None] == groups_N[None]
    assert far_NN[is_same_NN].max() < far_NN[~is_same_NN].min()
    assert np.array_equal(maps.umap(z_NL, seed=3).xy_N2, plane.xy_N2)
    assert not np.array_equal(maps.umap(z_NL, seed=4).xy_N2, plane.xy_N2)
    assert np.isfinite(maps.umap(z_NL[:9]).xy_N2).all()


def test_umap_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"--umap needs the package umap-learn .*vae_ds\[look\]"):
        maps.umap(np.eye(9))


def test_a_grid_lies_between_its_corners(vae: TextVAE) -> None:
    z_NL = vae.encode(TEXTS).numpy()
    plane = maps.pca(z_NL)
    found = maps.grid(vae, z_NL, plane, size=3)
    a, b, c, d = found.corners
    x, y = plane.xy_N2.T
    assert x[a] < x[b]
    assert x[c] < x[d]
    assert y[a] > y[c]
    assert y[b] > y[d]
    ends = [found.texts[0][0], found.texts[0][2], found.texts[2][0], found.texts[2][2]]
    assert ends == vae.decode(z_NL[[a, b, c, d]])
    assert found.texts[0][1] == vae.decode((z_NL[[a]] + z_NL[[b]]) / 2)[0]
    assert found.texts[1][1] == vae.decode(z_NL[[a, b, c, d]].mean(0, keepdims=True))[0]


def test_gains_by_position_are_those_of_single_tokens(vae: TextVAE) -> None:
    texts = TEXTS[:6]
    found = positions.gains(vae, texts, seed=3)
    z_NL = vae.encode(texts, sampled=True, seed=3)
    ids = [vae.tokenizer(text)["input_ids"] for text in texts]
    # Each text has the z of exactly one other: the sum over the texts is a function of this choice.
    with torch.no_grad():
        loss_NN = torch.stack(
            [vae.model.token_losses(z_NL, torch.tensor([own] * 6)).sum(1) for own in ids]
        ).double()  # row: text, column: z
        first_NN = torch.stack([vae.model.token_losses(z_NL, torch.tensor([own] * 6))[:, 0] for own in ids]).double()
    rises_NN = loss_NN - loss_NN.diagonal()[:, None]
    mates = _mates(6, 3)
    assert sorted(mates) == list(range(6))
    assert all(mate != row for row, mate in enumerate(mates))
    assert found.total == pytest.approx(float(rises_NN[range(6), mates].mean()), abs=1e-4)
    first_N = first_NN[range(6), mates] - first_NN.diagonal()
    assert found.gain_T[0] == pytest.approx(float(first_N.mean()), abs=1e-4)
    assert found.se_T[0] == pytest.approx(float(first_N.std()) / 6**0.5, abs=1e-4)
    # The parts add up to the whole.
    assert found.ends == found.count_T[0] == 6
    assert np.nansum(found.gain_T * found.count_T) + found.end * found.ends == pytest.approx(6 * found.total, abs=1e-3)
    assert found.count_T.sum() + found.ends == sum(map(len, ids))
    with pytest.raises(DataError, match="at least two texts"):
        positions.gains(vae, texts[:1])


def _mates(count: int, seed: int) -> list[int]:
    from vae_ds.distributed import stream

    order = stream(seed, "positions").permutation(count)
    return [int(order[(list(order).index(row) + 1) % count]) for row in range(count)]


def test_the_command_writes_pictures_and_numbers(
    vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "mine"
    vae.save_pretrained(run / "model")
    (run / "config.yaml").write_text("name: x\n")  # a run, whose data are not needed here
    kl = [[0.5, 0.1, 0.2, 0.3, 0.0], [0.6, 0.1, 0.2, 0.3, 0.1]]
    rows = [{"step": 10 * (at + 1), "split": "valid", "kl_per_dim": row} for at, row in enumerate(kl)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    (tmp_path / "texts.txt").write_text("".join(f"{at % 3}\t{text}\n" for at, text in enumerate(TEXTS)))
    words = ["map", str(run / "model"), str(tmp_path / "texts.txt"), "--labelled", "--device", "cpu"]
    assert cli.run([*words, "--to", str(tmp_path / "map.svg"), "--projector", str(tmp_path / "projector")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == [
        "map.svg", "map-grid.svg", "map-positions.svg", "projector", "map.json",
    ]  # fmt: skip
    assert all(file.exists() for file in files)
    facts = json.loads((tmp_path / "map.json").read_text())
    assert [(one["text"], one["value"]) for one in facts["texts"]] == [
        (text, str(at % 3)) for at, text in enumerate(TEXTS)
    ]
    drawn = (tmp_path / "map.svg").read_text()
    assert "coloured by label" in drawn
    assert "2 (13)" in drawn  # the legend has the number of texts
    grid = "".join((tmp_path / "map-grid.svg").read_text().split())
    assert facts["grid"]["texts"][2][2].split()[0] in grid
    assert len(facts["z_gain"]["by_position"]) == len(facts["z_gain"]["tokens"])
    # What TensorBoard reads.
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig

    read = text_format.Parse((tmp_path / "projector" / "projector_config.pbtxt").read_text(), ProjectorConfig())
    codes = np.loadtxt(tmp_path / "projector" / read.embeddings[0].tensor_path)
    np.testing.assert_allclose(codes, vae.encode(TEXTS), rtol=1e-4, atol=1e-5)
    told = (tmp_path / "projector" / read.embeddings[0].metadata_path).read_text()
    table = list(csv.DictReader(io.StringIO(told), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [(row["text"], row["label"]) for row in table] == [(text, str(at % 3)) for at, text in enumerate(TEXTS)]
    # The record of a run.
    steps, kl_SL = maps.units_over_training(run) or ([], np.zeros(0))
    assert (steps, kl_SL.tolist()) == ([10, 20], kl)
    assert maps.units_over_training(tmp_path) is None
    pictures.draw_units(tmp_path / "units.png", steps, kl_SL, "title")
    assert (tmp_path / "units.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "map.gif"], "the ending must be one of .png, .svg, .pdf"),
        (["--to", "no/map.png"], "no is no directory"),
        (["nothing.txt", "--to", "map.png"], "nothing.txt: no such file"),
        (["--to", "map.png"], "no texts of its own; give a FILE of texts"),
        (["texts.txt", "--to", "map.png", "--colour", "mood"], "the texts have length, first word"),
    ],
)
def test_wrong_words_are_one_line(
    vae: TextVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    vae.save_pretrained("model")
    Path("texts.txt").write_text("one text\nanother text\n")
    assert cli.run(["map", "model", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_gaussian_has_the_moments_of_its_texts(vae: TextVAE, labelled: Labelled) -> None:
    found = by_label.fit(vae, labelled, "label")
    assert set(found) == {"chair", "bicycle"}
    own = [text for text, label in zip(labelled.texts, labelled.labels, strict=True) if label == "chair"]
    mu_NL, logvar_NL = (part.double().numpy() for part in vae.posterior(own))
    z_NL = found["chair"].draw(20_000, seed=1)
    np.testing.assert_allclose(z_NL.mean(0), mu_NL.mean(0), atol=0.06)
    expected_LL = np.cov(mu_NL.T, bias=True) + np.diag(np.exp(logvar_NL).mean(0))
    np.testing.assert_allclose(np.cov(z_NL.T), expected_LL, atol=0.1)
    np.testing.assert_array_equal(found["chair"].draw(3, seed=1, first=5), z_NL[5:8])
    assert not np.allclose(found["bicycle"].draw(3, seed=1), found["chair"].draw(3, seed=1))
    # With fewer texts than units, a code still has every direction.
    few = Labelled(labelled.texts[:1] * 12, {"label": ["x"] * 12})
    assert np.linalg.matrix_rank(by_label.fit(vae, few, "label")["x"].root_LL) == vae.latent_dim
    for error, labels, target, message in (
        (ConfigError, None, "mood", "no target mood; they have label"),
        (DataError, ["sofa"], "label", "no texts with the label 'sofa'; found: 'bicycle', 'chair'"),
    ):
        with pytest.raises(error, match=message):
            by_label.chosen(by_label.fit(vae, labelled, target), labels)


def test_texts_of_a_label_and_their_scores(
    vae: TextVAE, labelled: Labelled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae.save_pretrained(tmp_path / "model")
    lines = [f"{label}\t{text}\n" for label, text in zip(labelled.labels, labelled.texts, strict=True)]
    (tmp_path / "labels.txt").write_text("".join(lines))
    words = ["sample-label", str(tmp_path / "model"), "--labels", str(tmp_path / "labels.txt"), "--device", "cpu"]
    assert cli.run([*words, "--label", "chair", "-n", "3", "--max-new-tokens", "8"]) == 0
    told = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    expected = vae.decode(by_label.fit(vae, labelled, "label")["chair"].draw(3), max_new_tokens=8)
    assert told == [["chair", text] for text in expected]
    assert cli.run([*words, "--score", "12", "--json", "--max-new-tokens", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classifier_accuracy"] == 1
    assert [one["label"] for one in found["labels"]] == ["bicycle", "chair"]
    for one in found["labels"]:
        made = vae.decode(by_label.fit(vae, labelled, "label")[one["label"]].draw(12), max_new_tokens=12)
        assert 0 <= one["hit"] <= 1
        assert one["diversity"]["distinct_1"] <= 1
        assert one["compared"] == len(made) == 12
    assert targets.classes(labelled.labels)[1].tolist() == list(labelled.labels)
