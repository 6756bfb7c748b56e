"""Texts of a label, without training: a Gaussian on the codes of each label, and how often the label is met.

Shapes: N texts of a label, or samples, L latent units.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_ds.distributed import stream
from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import diversity
from vae_ds.inspection import probes, targets
from vae_ds.inspection.targets import Labelled
from vae_ds.runtime import evaluations, require
from vae_ds.textvae import TextVAE


@dataclass(frozen=True)
class Gaussian:
    """N(mean_L, root_LL root_LL^T), the Gaussian of the codes of `texts` texts with a label."""

    label: str
    texts: int
    mean_L: np.ndarray
    root_LL: np.ndarray

    def draw(self, n: int, seed: int = 0, first: int = 0) -> np.ndarray:
        """`n` codes, float32 (n, L). Code i is a function of the seed, the label and first + i."""
        rows = range(first, first + n)
        eps_NL = np.stack([stream(seed, "by-label", self.label, row).standard_normal(len(self.mean_L)) for row in rows])
        return (self.mean_L + eps_NL @ self.root_LL.T).astype(np.float32)


@dataclass(frozen=True)
class Score:
    """How often `samples` texts of a label have it, and their diversity beside that of as many texts of the corpus.

    hit, hit_se: the share that a classifier of the words gives the label; the standard error is over the samples.
    diversity, of_corpus: `distinct_1` to `distinct_4`, `self_bleu`, `self_bleu_se` of docs/metrics.md. `compared`: how
        many texts each has.
    """

    label: str
    samples: int
    hit: float
    hit_se: float | None
    compared: int
    diversity: dict[str, Any]
    of_corpus: dict[str, Any]


def fit(vae: TextVAE, labelled: Labelled, target: str) -> dict[str, Gaussian]:
    """A Gaussian for each class of the target (`targets.classes`), with the moments of its aggregate posterior.

    The mean is that of mu. The covariance is that of mu plus the mean of the posterior variances, so it has full rank
    for any number of texts. Raises ConfigError if the texts have no such target, DataError if it has no class.
    """
    rows, named = classes_of(labelled, target)
    texts = [labelled.texts[row] for row in rows]
    mu_NL, logvar_NL = (part.double().numpy() for part in vae.posterior(texts))
    found = {}
    for label in np.unique(named).tolist():
        own_N = named == label
        covariance_LL = np.atleast_2d(np.cov(mu_NL[own_N].T, bias=True)) + np.diag(np.exp(logvar_NL[own_N]).mean(0))
        root_LL = np.linalg.cholesky(covariance_LL)
        found[label] = Gaussian(label, int(own_N.sum()), mu_NL[own_N].mean(0), root_LL)
    return found


def chosen(found: Mapping[str, Gaussian], labels: Sequence[str] | None) -> list[Gaussian]:
    """The Gaussians of some labels, or of all. Raises DataError for an unknown one."""
    for label in labels or ():
        need_label(label, found)
    return [found[label] for label in labels or found]


def need_label(label: str, known: Collection[str]) -> None:
    """Raise DataError if no text has the label."""
    if label not in known:
        raise DataError(f"no texts with the label {label!r}; found: {', '.join(map(repr, known))}")


def score(
    vae: TextVAE, labelled: Labelled, target: str, gaussians: Sequence[Gaussian], samples: int, **decoding: Any
) -> tuple[float, float | None, list[Score]]:
    """The accuracy of the classifier, its standard error, and the scores of `samples` texts of each label.

    The classifier is a logistic regression of the counts of words, trained on the labelled texts; it has not seen the
    model. Its accuracy is that of a five-fold cross-validation: more hits than that are no evidence of a better model.
    Raises ConfigError without scikit-learn, DataError if the target has one class only.
    """
    require("look", "scikit-learn", "sklearn", "the share of samples with their label")
    rows, named = classes_of(labelled, target)
    if len(set(named.tolist())) < 2:
        raise DataError(f"the target {target} has one class only; a classifier needs two")
    words = np.array([labelled.texts[row] for row in rows], dtype=object)
    known = evaluations.estimate(probes.correct(words, named))
    judge = probes.classifier(words).fit(words, named)
    seed, scores = decoding.get("seed") or 0, []
    for one in gaussians:
        made = vae.decode(one.draw(samples, seed), **decoding)
        hit = evaluations.estimate(judge.predict(np.array(made, dtype=object)) == one.label)
        own = words[named == one.label].tolist()
        compared = min(len(own), samples)
        scores.append(
            Score(one.label, samples, hit.mean, hit.se, compared, diversity(made[:compared]), diversity(own[:compared]))
        )
    return known.mean, known.se, scores


def table(accuracy: float, accuracy_se: float | None, scores: Sequence[Score]) -> str:
    """The scores for people, as a Markdown table."""
    head = (
        "| label | samples | with the label | distinct_1 | of corpus | distinct_2 | of corpus | self_bleu | of corpus |"
    )
    lines = [head, "|" + "---|" * 9]
    for one in scores:
        cells = [one.label, str(one.samples), evaluations.with_error(100 * one.hit, one.hit_se and 100 * one.hit_se)]
        for name, digits in (("distinct_1", 3), ("distinct_2", 3), ("self_bleu", 1)):
            cells += ["" if of[name] is None else f"{of[name]:.{digits}f}" for of in (one.diversity, one.of_corpus)]
        lines.append("| " + " | ".join(cells) + " |")
    told = evaluations.with_error(100 * accuracy, accuracy_se and 100 * accuracy_se)
    return "\n".join(
        [*lines, "", f"% of the samples; the classifier is right for {told} % of texts that it has not seen"]
    )


def classes_of(labelled: Labelled, target: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the texts with a class of the target, and their classes (`targets.classes`).

    Raises ConfigError if the texts have no such target, DataError if it has no class.
    """
    if target not in labelled.targets:
        raise ConfigError(f"the texts have no target {target}; they have {', '.join(labelled.targets) or 'none'}")
    rows, named = targets.classes(labelled.targets[target])
    if not len(rows):
        raise DataError(f"no value of {target} has {targets.LEAST_MEMBERS} texts; give more")
    return rows, named
