"""Does a shift along the difference of two labels change the label? Scores of `shift` on labelled texts.

The direction is the mean code of the texts of one label minus that of another, as `shift` takes it. Texts that had no
part in it are shifted.

Shapes: N texts, L latent units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_ds.distributed import stream
from vae_ds.errors import DataError
from vae_ds.evaluation import bleu
from vae_ds.inspection import probes
from vae_ds.inspection.by_label import classes_of, need_label
from vae_ds.inspection.targets import Labelled
from vae_ds.runtime import evaluations, require
from vae_ds.textvae import TextVAE

LEAST = 2  # texts for the direction, and texts to shift


@dataclass(frozen=True)
class Score:
    """What became of `texts` texts of a label, shifted by `factor` times the direction.

    factor: 0 is a reconstruction; None are the source texts themselves.
    changed, changed_se: the share to which the classifier gives the label that was asked for.
    bleu, bleu_se: corpus BLEU of the shifted texts against their sources, 0 to 100.
    """

    factor: float | None
    texts: int
    changed: float
    changed_se: float | None
    bleu: float
    bleu_se: float | None


@dataclass(frozen=True)
class Result:
    """The scores by factor, and the accuracy of the classifier on texts that it has not seen."""

    start: str
    goal: str
    of_direction: tuple[int, int]
    accuracy: float
    accuracy_se: float | None
    scores: list[Score]


def score(
    vae: TextVAE, labelled: Labelled, target: str, start: str, goal: str, factors: Sequence[float], most: int = 200,
    **decoding: Any,
) -> Result:  # fmt: skip
    """Shift up to `most` texts of the label `start` towards `goal`, by each factor.

    Half of the texts of `start`, drawn by `seed`, are for the direction; of the other half, texts are shifted. The
    classifier is a logistic regression of the counts of words, trained on all texts but the shifted ones. It has not
    seen the model. Raises ConfigError without scikit-learn, or if the texts have no such target; DataError for an
    unknown label or too few texts.
    """
    require("look", "scikit-learn", "sklearn", "the share of changed labels")
    rows, named = classes_of(labelled, target)
    words = np.array([labelled.texts[row] for row in rows], dtype=object)
    for label in (start, goal):
        need_label(label, np.unique(named).tolist())
    if start == goal:
        raise DataError(f"a shift from {start!r} to itself changes nothing; name two labels")
    own = np.flatnonzero(named == start)
    own = stream(decoding.get("seed") or 0, "shift-label").permutation(own)
    of_direction, tried = own[: len(own) // 2], own[len(own) // 2 :][:most]
    if min(len(of_direction), len(tried)) < LEAST:
        raise DataError(f"{len(own)} texts with the label {start!r} are too few; give {2 * LEAST} or more")
    ends = [vae.encode(words[part].tolist()).mean(0) for part in (of_direction, np.flatnonzero(named == goal))]
    others = np.setdiff1d(np.arange(len(words)), tried)
    judge = probes.classifier(words).fit(words[others], named[others])
    accuracy = evaluations.estimate(probes.correct(words, named))
    sources = words[tried].tolist()

    def of(factor: float | None) -> Score:
        made = sources if factor is None else vae.shift(sources, ends[1] - ends[0], factor, **decoding)
        changed = evaluations.estimate(judge.predict(np.array(made, dtype=object)) == goal)
        found = bleu(made, sources)
        return Score(factor, len(made), changed.mean, changed.se, found["bleu"], found["bleu_se"])

    scores = [of(factor) for factor in (None, 0.0, *factors)]
    parts = (len(of_direction), int((named == goal).sum()))
    return Result(start, goal, parts, accuracy.mean, accuracy.se, scores)


def table(result: Result) -> str:
    """The scores for people, as a Markdown table."""
    lines = [f"| factor | texts | {result.goal} | BLEU to the source |", "|---|---|---|---|"]
    for one in result.scores:
        changed = evaluations.with_error(100 * one.changed, one.changed_se and 100 * one.changed_se)
        near = evaluations.with_error(one.bleu, one.bleu_se)
        factor = "the source" if one.factor is None else f"{one.factor:g}" if one.factor else "0 (reconstruction)"
        lines.append(f"| {factor} | {one.texts} | {changed} | {near} |")
    told = evaluations.with_error(100 * result.accuracy, result.accuracy_se and 100 * result.accuracy_se)
    notes = [
        f"% of the texts of {result.start} to which the classifier gives {result.goal}; it is right for {told} % of"
        " texts that it has not seen",
        f"direction from {result.of_direction[0]:,} texts of {result.start}, not those that were shifted, to"
        f" {result.of_direction[1]:,} of {result.goal}",
    ]
    return "\n".join([*lines, "", *notes])
