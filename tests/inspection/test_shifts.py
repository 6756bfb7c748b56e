"""Scores of shifts from one label to another: what is shifted, where to, and how it is judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from vae_ds import cli
from vae_ds.errors import DataError
from vae_ds.inspection import Labelled, shifts
from vae_ds.textvae import TextVAE


class Swapping:
    """A model with a known result: the code is whether a text has a bicycle, and decides which thing is written."""

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([["bicycle" in text] for text in texts], np.float32)

    def shift(self, texts: list[str], direction: np.ndarray, factor: float, **_: object) -> list[str]:
        here_N = self.encode(texts)[:, 0] + factor * direction[0]
        names = ["bicycle" if here > 0.5 else "chair" for here in here_N]
        return [text.replace("chair", name) for text, name in zip(texts, names, strict=True)]


def test_a_label_changes_from_the_middle_on(labelled: Labelled) -> None:
    model: object = Swapping()
    found = shifts.score(model, labelled, "label", "chair", "bicycle", [0.4, 0.6, 1])  # type: ignore[arg-type]
    assert [one.factor for one in found.scores] == [None, 0, 0.4, 0.6, 1]
    *before, after, last = (one.changed for one in found.scores)
    # The classifier also looks at the other words of the sentence.
    assert before == [0, 0, 0]
    assert 0.5 < after == last
    chairs, bicycles = labelled.labels.count("chair"), labelled.labels.count("bicycle")
    assert found.of_direction == (chairs // 2, bicycles)
    assert {one.texts for one in found.scores} == {chairs - chairs // 2}
    assert [one.bleu for one in found.scores[:3]] == pytest.approx([100] * 3)
    assert 50 < found.scores[3].bleu < 99
    assert found.accuracy == 1
    assert "| 0.6 | " in shifts.table(found)
    assert "| 0 (reconstruction) | " in shifts.table(found)


def test_the_scores_are_those_of_the_model(
    labelled: Labelled, vae: TextVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the texts that the direction does not know; the command prints what the function finds."""
    how = {"max_new_tokens": 8, "seed": 3}
    found = shifts.score(vae, labelled, "label", "chair", "bicycle", [2], 5, **how)
    own = np.flatnonzero(np.array(labelled.labels) == "chair")
    tried = shifts.stream(3, "shift-label").permutation(own)
    sources = [labelled.texts[row] for row in tried[len(own) // 2 :][:5]]
    direction = vae.encode([text for text in labelled.texts if "bicycle" in text]).mean(0)
    direction = direction - vae.encode([labelled.texts[row] for row in tried[: len(own) // 2]]).mean(0)
    made = vae.shift(sources, direction, 2, **how)
    assert found.scores[-1].bleu == pytest.approx(sacrebleu.corpus_bleu(made, [sources]).score)
    assert found.scores[0].bleu == pytest.approx(100)

    vae.save_pretrained(tmp_path / "model")
    lines = [f"{label}\t{text}\n" for label, text in zip(labelled.labels, labelled.texts, strict=True)]
    (tmp_path / "labels.txt").write_text("".join(lines))
    words = ["shift-label", str(tmp_path / "model"), "--labels", str(tmp_path / "labels.txt"), "--device", "cpu"]
    words += ["--from", "chair", "--into", "bicycle", "--factor", "2", "-n", "5", "--seed", "3"]
    assert cli.run([*words, "--max-new-tokens", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scores"] == json.loads(json.dumps([vars(one) for one in found.scores]))
    assert told["model"] == vae.fingerprint


@pytest.mark.parametrize(
    ("start", "goal", "said"),
    [
        ("sofa", "chair", "no texts with the label 'sofa'; found: 'bicycle', 'chair'"),
        ("chair", "chair", "from 'chair' to itself changes nothing"),
    ],
)
def test_labels_that_cannot_be_shifted(labelled: Labelled, vae: TextVAE, start: str, goal: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        shifts.score(vae, labelled, "label", start, goal, [1])
