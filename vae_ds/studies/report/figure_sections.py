"""The sections of a report that have figures, with the text that explains them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vae_ds.studies import figures, runs, setting_words
from vae_ds.studies.figures import Curve, Limit, Point
from vae_ds.studies.metric_tables import ERROR
from vae_ds.studies.report.page import Page, Row, is_number, listed, markdown
from vae_ds.studies.report.run_looks import REFERENCE, Look, looks
from vae_ds.studies.runs import Run

ALL_NAMED = 12  # runs at most that a figure names each; of more, it names the front and the reference
# The error of a loss is that of the sentences, which all runs share. Its bars would hide clear differences.
WITH_BARS = ("mi_train", figures.ABOVE)
PAPER_FIGURES = {1: "Figure 2", 2: "Figure 3"}

WHAT_CURVES_SAY = """\
A curve is one run. Its label says in which settings it differs from the other curves, and runs that are the same up
to the end of this phase are one curve. A validation measures a model during the training, on sentences that it is not
trained on:

- mutual information, in nats: how much the code z says about its sentence. It is an estimate within the validated
  sentences. It cannot exceed the logarithm of their number, whatever the code says.
- active units: the units of z that differ between sentences.
- KL, in nats per sentence: the cost of the code. It falls to 0 when the model stops using z (posterior collapse)."""

WHAT_THE_PLANE_SAYS = """\
Each point is a run. The rate (x) is the KL: the nats per sentence that the code z may carry. The distortion (y) is
the reconstruction loss `rec`: the nats per sentence that the decoder still lacks when it knows z. Their sum is
`nelbo`, an upper bound on the negative log-likelihood; it is the same along each dotted line, and lower is better.

- A collapsed run is at the left edge: its KL is near 0.
- A run that pays KL for a code which its decoder ignores is further right than others, but not lower.
- The dashed line is the loss of a plain language model (without z), which is exact. A run below the line has a bound
  that is better than this loss."""

WHAT_INFORMATION_SAYS = """\
Each point is a run. `{x}` (x) estimates the mutual information of sentence and code, how much z says about its
sentence, {estimate}. {likelihood}

- The step line connects the Pareto front: the runs for which no other run has more information and at most the same
  `{y}`, or less `{y}` and at least the same information. Differences within the errors count, too.
- The dotted line is the limit of the estimate, {limit}. The line shows the size of the sample. A run near the line can
  have more information than the estimate shows; it is no better for being near.
- {line}
{bars}"""
BARS = "- The bars are standard errors over the sentences."
ESTIMATES = {
    "mi_train": "from below, against {count} training sentences",
    "mi": "from below, within the evaluated sentences",
}
LIMITS = {
    "mi_train": "ln(N + 1) for the N training sentences",
    "mi": "ln N for the N evaluated sentences",
}
LIKELIHOODS = {
    figures.ABOVE: (
        "`above_yardstick` (y) is what the code costs: `iw_nll` minus the loss of the plain language model on the same"
        " sentences, in nats per sentence. Less is better. The axis on the right shows it as the factor of the"
        " perplexity per word."
    ),
    "iw_nll": (
        "`iw_nll` (y) is the importance-weighted bound on the negative log-likelihood, in nats per sentence. Less is"
        " better. The axis on the right shows it as the perplexity per word, e to the power of nats per word."
    ),
    "nelbo": (
        "`nelbo` (y) is the bound rec + KL on the negative log-likelihood, in nats per sentence. Less is better. The"
        " axis on the right shows it as the perplexity per word, e to the power of nats per word."
    ),
}
LINES = {
    figures.ABOVE: "The dashed line at 0 is the language model, the one that each run was evaluated with"
    " (`--yardstick`).",
    "": "The dashed line is a plain language model. It has no z, and so no mutual information.",
}

WHAT_GROUPS_ARE = """\
The figures show these runs in groups. The runs of a group change the same setting, compared with the most common
settings of all runs; those of the group "several settings" change more than one. Each group has a colour, and each
run a shade of it, which is the same in all figures. Where the runs are points, only the reference and the runs on the
Pareto front are named. `runs.csv` has the numbers of all runs."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none has an x as high and a y as low, and one of them better."""

    def beats(one: Point, other: Point) -> bool:
        return one.x >= other.x and one.y <= other.y and (one.x, one.y) != (other.x, other.y)

    return [point for point in points if not any(beats(other, point) for other in points)]


def figure_sections(page: Page, groups: Mapping[str, Sequence[Run]]) -> None:
    """All figures of the runs, by the name of their data."""
    drawn_as = {name: looks(_latent(members)) for name, members in groups.items()}
    for name in groups:
        _groups_of_colours(page, name if len(groups) > 1 else "", drawn_as[name])
    for draw in (_along_phases, _rate_distortion, _perplexity_information):
        for name, members in groups.items():
            draw(page, name if len(groups) > 1 else "", members, drawn_as[name])


def _groups_of_colours(page: Page, data: str, drawn_as: Mapping[str, Look]) -> None:
    """A table of the groups in which the runs are drawn, if they are."""
    members: dict[str, list[str]] = {}
    for name, look in drawn_as.items():
        if look.group is not None:
            members.setdefault(look.group, []).append(name)
    if not members:
        return
    page.section("Groups of runs", WHAT_GROUPS_ARE)
    if data:
        page.say(f"### {data}")
    rows: list[Row] = [{"group": group, "runs": ", ".join(names)} for group, names in members.items()]
    page.say(markdown({"group": "group", "runs": "runs"}, rows))


def _along_phases(page: Page, data: str, members: Sequence[Run], drawn_as: Mapping[str, Look]) -> None:
    """A figure for each phase that has validations, of the runs that have a code; of many runs one for each topic."""
    latent = _latent(members)
    found = {run.name: runs.validations(run) for run in latent}
    for number in sorted({number for of_run in found.values() for number in of_run}):
        part = [run for run in latent if number in found[run.name]]
        remark = f" They are the counterpart of the paper's {PAPER_FIGURES[number]}." if number in PAPER_FIGURES else ""
        page.section(f"Phase {number}", f"The validations during this phase.{remark} {WHAT_CURVES_SAY}")
        topics = runs.by_topic({run.name: runs.up_to_phase(run, number) for run in part})
        reference = topics.pop("")
        if len(part) <= len(figures.COLOURS) or not topics:
            name, title = _named(f"phase-{number}", f"Validations during phase {number}", data)
            figures.phase(page.folder, name, title, _curves(part, found, number, drawn_as, ()))
            page.figure(name, title)
            continue
        for topic, names in topics.items():
            words = setting_words.topic_words(topic)
            name, title = _named(f"phase-{number}-{topic}", f"Validations during phase {number}: {words}", data)
            of_topic = [run for run in part if run.name in (*reference, *names)]
            curves = _curves(of_topic, found, number, drawn_as, reference)
            figures.phase(page.folder, name, title, curves)
            page.figure(name, title)
    without = [run.name for run in latent if not found[run.name]]
    if without and len(without) == len(latent):
        page.section("Phases", "No run has validations, so there is no figure of a phase.")
    elif without:
        page.say(f"Runs without a validation, which are in no figure of a phase: {listed(without)}.")


def _curves(
    members: Sequence[Run],
    found: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]],
    number: int,
    drawn_as: Mapping[str, Look],
    reference: Sequence[str],
) -> list[Curve]:
    """One curve per run, labelled by the settings that differ up to this phase.

    Runs with the same settings are one curve: with a `reference` always, else if their rows are the same."""
    # Of runs that are the same, the one that is the reference in all figures gives the curve its colour.
    ordered = sorted(members, key=lambda run: (run.name not in reference, drawn_as[run.name].group != REFERENCE))
    settings = {run.name: runs.up_to_phase(run, number) for run in ordered}
    keys = runs.differing(list(settings.values()))
    by_label: dict[str, list[Curve]] = {}
    for run in ordered:
        rows = tuple({key: row.get(key) for key in ("step", *figures.PANELS)} for row in found[run.name][number])
        label = setting_words.label(settings[run.name], keys) or run.name if keys or len(ordered) == 1 else "all runs"
        same = by_label.setdefault(label, [])
        # Among many runs, a repetition that differs only in rounding would be noise.
        if not same or (not reference and all(curve.rows != rows for curve in same)):
            is_reference = run.name in reference and not any(c.is_reference for cs in by_label.values() for c in cs)
            label = f"{label}, {run.name}" if same else label
            same.append(Curve(label, rows, drawn_as[run.name].colour, is_reference))
    return [curve for curves in by_label.values() for curve in curves]


def _rate_distortion(page: Page, data: str, members: Sequence[Run], drawn_as: Mapping[str, Look]) -> None:
    latent, yardsticks = _latent(members), _yardsticks(members)
    drawn = [run for run in latent if is_number(run.metric("kl")) and is_number(run.metric("rec"))]
    if not drawn:
        return
    name, title = _named("rate-distortion", "Rate and distortion", data)
    entropy, cut = _entropy_nats(members[0]), any(run.metric("truncated") for run in members)
    points = _points(drawn, latent, "kl", "rec", drawn_as)
    # Less is better in both.
    front = pareto_front(list(map(_flipped, points)))
    outliers = figures.rate_distortion(
        page.folder,
        name,
        title,
        _with_names(points, list(map(_flipped, front))),
        {label: run.metric("rec") for label, run in _yardstick_labels(yardsticks) if is_number(run.metric("rec"))},
        None if cut else entropy,
    )
    page.section("Rate and distortion", WHAT_THE_PLANE_SAYS)
    if entropy is not None:
        left_out = "is not drawn, because sentences were cut at `data.max_tokens`" if cut else "is the solid line"
        page.say(f"The entropy of a sentence of the source, {entropy:.2f} nats, {left_out}.")
    page.figure(name, title)
    _say_what_is_missing(page, latent, drawn, outliers, ("kl", "rec"))


def _perplexity_information(page: Page, data: str, members: Sequence[Run], drawn_as: Mapping[str, Look]) -> None:
    latent, yardsticks = _latent(members), _yardsticks(members)
    likelihood, perplexity = _likelihood([*latent, *yardsticks])
    drawn = [run for run in latent if is_number(run.metric(likelihood)) and is_number(run.metric("mi"))]
    if not drawn:
        return
    x = "mi_train" if _all_have(drawn, "mi_train", "mi_train_sentences") else "mi"
    y = figures.ABOVE if _all_have(drawn, figures.ABOVE, "iw_sentences") else likelihood
    if y == figures.ABOVE:
        lines = {"language model": 0.0}
        words = _words_per_sentence(drawn, "iw_nll", "iw_ppl")
    else:
        of_plain = [(label, run.metric(y)) for label, run in _yardstick_labels(yardsticks)]
        lines = {label: nll for label, nll in of_plain if is_number(nll)}
        words = _words_per_sentence([*latent, *yardsticks], y, perplexity)
    name, title = _named("perplexity-information", "Perplexity and information", data)
    points = _points(drawn, latent, x, y, drawn_as)
    best = pareto_front(points)
    # By the point and not by its label, which may be the run's settings.
    on_front = [(point, run.name) for run, point in zip(drawn, points, strict=True) if point in best]
    on_front.sort(key=lambda one: (one[0].x, one[0].y))
    outliers = figures.perplexity_information(
        page.folder,
        name,
        title,
        (x, y),
        _with_names(points, best),
        [point for point, _ in on_front],
        _limit(drawn[0], x),
        lines,
        words,
    )
    said = WHAT_INFORMATION_SAYS.format(
        x=x,
        y=y,
        estimate=ESTIMATES[x].format(count=f"{drawn[0].metric('mi_train_sentences') or 0:,}"),
        limit=LIMITS[x],
        likelihood=LIKELIHOODS[y],
        line=LINES.get(y, LINES[""]),
        bars=BARS if {x, y} & set(WITH_BARS) else "",
    ).strip()
    page.section("Perplexity and information", said)
    if said not in page.parts:
        page.say(said)  # of other data, drawn in another way
    page.figure(name, title)
    names = listed(name for _, name in on_front)
    page.say(f"On the front, by `{y}` and `{x}`, from the lowest `{x}` on: {names}.")
    _say_what_is_missing(page, latent, drawn, outliers, (x, y))


def _all_have(drawn: Sequence[Run], key: str, extent: str) -> bool:
    """Whether all runs have a metric, computed on as many sentences."""
    return all(is_number(run.metric(key)) for run in drawn) and len({run.metric(extent) for run in drawn}) == 1


def _limit(run: Run, x: str) -> Limit | None:
    """The limit of an estimate of the mutual information, which is the same for the runs of a figure."""
    if x == "mi_train":
        count = run.metric("mi_train_sentences")
        return Limit(math.log(count + 1), f"({count:,} + 1)")
    ceiling = run.metric("mi_ceiling")
    return Limit(ceiling, f"{run.metric('sentences'):,}") if is_number(ceiling) else None


def _points(drawn: Sequence[Run], latent: Sequence[Run], x: str, y: str, drawn_as: Mapping[str, Look]) -> list[Point]:
    """The runs by two of their metrics: a few by what differs, in words, and many by their names."""
    labels = runs.labels(latent)
    points = []
    for run in drawn:
        look = drawn_as[run.name]
        label = labels[run.name] if look.group is None else run.name
        place = run.metric(x), run.metric(y)
        x_se, y_se = (run.metric(f"{key}{ERROR}") if key in WITH_BARS else None for key in (x, y))
        points.append(
            Point(label, *place, look.colour, look.marker, look.group, look.group_colour, x_se=x_se, y_se=y_se)
        )
    return points


def _with_names(points: Sequence[Point], front: Sequence[Point]) -> list[Point]:
    """The points in the order in which they get their names; of many, only the reference and the front have one."""
    ranked = sorted(points, key=lambda point: (point.group != REFERENCE, point not in front))
    many = len(points) > ALL_NAMED
    return [replace(p, is_named=not many or p.group == REFERENCE or p in front) for p in ranked]


def _flipped(point: Point) -> Point:
    return replace(point, x=-point.x)


def _latent(members: Sequence[Run]) -> list[Run]:
    """The runs with a latent code, evaluated or not."""
    return [run for run in members if not run.is_yardstick]


def _yardsticks(members: Sequence[Run]) -> list[Run]:
    """The plain language models that were evaluated."""
    return [run for run in members if run.is_yardstick and run.metrics is not None]


def _yardstick_labels(yardsticks: Sequence[Run]) -> list[tuple[str, Run]]:
    alone = len(yardsticks) == 1
    return [("language model" if alone else f"language model {run.name}", run) for run in yardsticks]


def _likelihood(members: Sequence[Run]) -> tuple[str, str]:
    """The metric of the likelihood, and its perplexity: importance-weighted if every evaluated run has it, on as many
    sentences as the others; otherwise from the ELBO. The two are never mixed."""
    evaluated = [run for run in members if run.metrics is not None]
    sizes = {run.metric("iw_sentences") for run in evaluated}
    whole = all(is_number(run.metric("iw_nll")) for run in evaluated)
    return ("iw_nll", "iw_ppl") if whole and len(sizes) == 1 else ("nelbo", "ppl")


def _words_per_sentence(members: Sequence[Run], nll: str, perplexity: str) -> float | None:
    """Words per sentence by which perplexities were computed: ln ppl = nll / words. None if runs differ in it."""
    pairs = [(run.metric(nll), run.metric(perplexity)) for run in members]
    found = [n / math.log(p) for n, p in pairs if is_number(n) and is_number(p) and p > 1 and n > 0]
    return found[0] if found and max(found) - min(found) < 1e-3 * found[0] else None


def _entropy_nats(run: Run) -> float | None:
    """The entropy of a sentence of the source, where it is known: for the grammar."""
    if is_number(run.metric("entropy_nats")):
        return float(run.metric("entropy_nats"))
    if run.config.data.corpus != "grammar":
        return None
    from vae_ds.data import corpora

    return corpora.grammar.entropy_nats()


def _say_what_is_missing(
    page: Page, latent: Sequence[Run], drawn: Sequence[Run], outliers: Sequence[Point], axes: tuple[str, str]
) -> None:
    if outliers:
        points = listed(map(figures.describe, outliers))
        page.say(f"Beyond the axes of this figure, with `{axes[0]}` and `{axes[1]}`: {points}.")
    missing = [run.name for run in latent if run not in drawn]
    if missing:
        page.say(f"Not drawn, because a finite number is missing: {listed(missing)}.")


def _named(name: str, title: str, data: str) -> tuple[str, str]:
    """A figure's file name and title, with the name of the data where there are several data sets."""
    if not data:
        return name, title
    return f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')}", f"{title}: {data}"
