"""Probes: what a linear classifier reads from the code, beside what it reads from the words and from the base model.

Shapes: N texts, L latent units, H width of the T5.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_ds.errors import ConfigError, DataError
from vae_ds.evaluation import pooled_base
from vae_ds.inspection import targets
from vae_ds.inspection.targets import Labelled
from vae_ds.runtime import evaluations, require
from vae_ds.textvae import TextVAE

CODE, WORDS, ENCODER = "mu", "bag_of_words", "t5"
FOLDS = 5
ROUNDS = 1000  # of the optimizer, at most


@dataclass(frozen=True)
class Probe:
    """The accuracy of a logistic regression for one target.

    majority: the share of the most frequent class, which needs no input.
    accuracy, accuracy_se: by the input of the classifier: `mu` (the posterior mean), `bag_of_words` (the counts of the
        words), `t5` (the mean of the encoder's states of the pretrained base).
    above, above_se: the accuracy of `mu` minus that of each other input, paired by text.

    Accuracies are those of a five-fold cross-validation: each text is classified once, by a classifier that was not
    trained on it. A standard error is over the texts. It does not have the variance from the choice of training texts.
    """

    target: str
    texts: int
    classes: int
    majority: float
    accuracy: dict[str, float]
    accuracy_se: dict[str, float | None]
    above: dict[str, float]
    above_se: dict[str, float | None]


def probe(vae: TextVAE, labelled: Labelled, seed: int = 0) -> list[Probe]:
    """Probes of all targets of the texts that have two classes.

    Without the base of the model, there is no `t5`, with a warning. Raises ConfigError without scikit-learn, DataError
    if no target has two classes.
    """
    require("look", "scikit-learn", "sklearn", "a probe")
    chosen = {name: targets.classes(values) for name, values in labelled.targets.items()}
    chosen = {name: pair for name, pair in chosen.items() if len(set(pair[1])) > 1}
    if not chosen:
        raise DataError(
            f"no target of the {len(labelled.texts)} texts has two classes of {targets.LEAST_MEMBERS} texts; give more"
        )
    inputs = features(vae, labelled.texts)
    return [_probe(name, *pair, inputs, seed) for name, pair in chosen.items()]


def features(vae: TextVAE, texts: Sequence[str]) -> dict[str, Any]:
    """The inputs of the classifiers by name: arrays (N, L) and (N, H), and the texts themselves for the words."""
    inputs: dict[str, Any] = {CODE: vae.encode(texts).numpy(), WORDS: np.array(texts, dtype=object)}
    try:
        inputs[ENCODER] = pooled_base(vae.model.settings.base, vae.tokenizer, texts, vae.max_tokens, vae.device)
    except ConfigError as error:
        warnings.warn(f"no baseline of the T5: {error}", stacklevel=2)
    return inputs


def correct(inputs: Any, classes_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """Whether each text is classified correctly by a classifier that was not trained on it: float64 (N,), 0 or 1.

    inputs: an array (N, ...) of features, or N texts, of which the words are counted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found_N = cross_val_predict(classifier(inputs), inputs, classes_N, cv=folds)
    return np.asarray(found_N == classes_N, np.float64)


def classifier(inputs: Any) -> Any:
    """A logistic regression (C = 1) of standardized features or, for texts, of the counts of words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_text = np.asarray(inputs).dtype == object
    # The default pattern drops words of one letter.
    first = CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]") if is_text else StandardScaler()
    return make_pipeline(first, LogisticRegression(max_iter=ROUNDS))


def table(probes: Sequence[Probe]) -> str:
    """The probes for people, as a Markdown table."""
    names = list(dict.fromkeys(name for one in probes for name in one.accuracy))
    others = [name for name in names if name != CODE]
    head = ["target", "texts", "classes", "majority", *names, *(f"{CODE} - {name}" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in probes:
        cells = [one.target, f"{one.texts:,}", str(one.classes), f"{100 * one.majority:.1f}"]
        cells += [_cell(one.accuracy, one.accuracy_se, name) for name in names]
        cells += [_cell(one.above, one.above_se, name) for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Accuracy in %, {FOLDS}-fold cross-validation; ± is the standard error over the texts."
    return "\n".join([*lines, "", note])


def _probe(name: str, rows_N: np.ndarray, classes_N: np.ndarray, inputs: Mapping[str, Any], seed: int) -> Probe:
    right = {kind: correct(values[rows_N], classes_N, seed) for kind, values in inputs.items()}
    found = {kind: evaluations.estimate(values_N) for kind, values_N in right.items()}
    above = {kind: evaluations.estimate(right[CODE] - right[kind]) for kind in right if kind != CODE}
    _, counts = np.unique(classes_N, return_counts=True)
    return Probe(
        name, len(rows_N), len(counts), float(counts.max() / len(rows_N)),
        {kind: one.mean for kind, one in found.items()}, {kind: one.se for kind, one in found.items()},
        {kind: one.mean for kind, one in above.items()}, {kind: one.se for kind, one in above.items()},
    )  # fmt: skip


def _cell(values: Mapping[str, float], errors: Mapping[str, float | None], name: str) -> str:
    if name not in values:
        return ""
    return evaluations.with_error(100 * values[name], None if (se := errors[name]) is None else 100 * se)
