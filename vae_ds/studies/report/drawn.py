"""The figures of a report, with what is said about them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vae_ds.studies import figures, runs
from vae_ds.studies.figures import Curve, Point
from vae_ds.studies.report.page import Page, is_number, listed
from vae_ds.studies.runs import Run

MANY = 12  # runs that a figure can tell apart by a legend; more are drawn by what they differ in
PAPER_FIGURES = {1: "Figure 2", 2: "Figure 3"}

WHAT_CURVES_SAY = """\
A line's label has the settings that differ; runs that are the same up to here are one line. MI cannot pass ln of the
number of sentences validated."""

WHAT_THE_PLANE_SAYS = """\
The KL is the rate, the nats per sentence that the code may carry; rec is the distortion, what is left to say. On a
falling line their sum, the bound on the negative log-likelihood, is the same. A collapsed run stands at the left edge;
a run that pays KL for nothing moves right and not down. Below the yardstick's line, the bound is better than the exact
likelihood of a plain language model."""

WHAT_THE_FRONT_SAYS = """\
A run on the front has no other that is as good in one and better in the other. The ceiling of MI is ln of the number
of sentences: no estimate can pass it. A language model has no MI, so its perplexity is a line."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none has an x as high and a y as low, and one of them better."""

    def beats(one: Point, other: Point) -> bool:
        return one.x >= other.x and one.y <= other.y and (one.x, one.y) != (other.x, other.y)

    return [point for point in points if not any(beats(other, point) for other in points)]


def along_phases(page: Page, every: Sequence[Run]) -> None:
    """A figure for each phase that has validations, of the runs that have a latent code."""
    latent = [run for run in every if not run.is_yardstick]
    found = {run.name: runs.validations(run) for run in latent}
    for number in sorted({number for of_run in found.values() for number in of_run}):
        members = [run for run in latent if number in found[run.name]]
        name, title = f"phase-{number}", f"Phase {number}: MI, active units and KL of the validations"
        remark = f", the counterpart of the paper's {PAPER_FIGURES[number]}" if number in PAPER_FIGURES else ""
        page.say(f"## Along phase {number}", f"The validations during training{remark}. {WHAT_CURVES_SAY}")
        if len(members) <= MANY:
            figures.phase(page.folder, name, title, _curves(members, found, number))
            page.figure(name, title)
            continue
        topics = runs.by_topic({run.name: runs.up_to_phase(run, number) for run in members})
        reference = topics.pop("")
        for topic, names in topics.items():
            of_topic = f"Phase {number}, by {topic}: MI, active units and KL of the validations"
            part = [run for run in members if run.name in (*reference, *names)]
            figures.phase(page.folder, f"{name}-{topic}", of_topic, _curves(part, found, number))
            page.figure(f"{name}-{topic}", of_topic)
    without = [run.name for run in latent if not found[run.name]]
    if without:
        page.say(f"Without a validation, and so in no figure of a phase: {listed(without)}.")


def _curves(
    members: Sequence[Run], found: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], number: int
) -> list[Curve]:
    """One curve a run, labelled by what differs up to this phase; runs that are the same up to here are drawn once."""
    settings = [runs.up_to_phase(run, number) for run in members]
    keys = runs.differing(settings)
    by_label: dict[str, list[Curve]] = {}
    for run, own in zip(members, settings, strict=True):
        rows = tuple({key: row.get(key) for key in ("step", *figures.PANELS)} for row in found[run.name][number])
        label = runs.label(own, keys) or run.name if keys or len(members) == 1 else "all runs"
        same = by_label.setdefault(label, [])
        if all(curve.rows != rows for curve in same):
            same.append(Curve(f"{label}, {run.name}" if same else label, rows))
    return [curve for curves in by_label.values() for curve in curves]


def rate_distortion(page: Page, data: str, members: Sequence[Run], alone: bool) -> None:
    latent, yardsticks = _halves(members)
    drawn = [run for run in latent if is_number(run.metric("kl")) and is_number(run.metric("rec"))]
    if not drawn:
        return
    name, title = _named("rate-distortion", "Rate and distortion", data, alone)
    entropy, cut = _entropy_nats(members[0]), any(run.metric("truncated") for run in members)
    figures.plane(
        page.folder,
        name,
        title,
        _points(drawn, latent, "kl", "rec"),
        {label: run.metric("rec") for label, run in _yardstick_labels(yardsticks) if is_number(run.metric("rec"))},
        None if cut else entropy,
    )
    page.section("Rate and distortion", WHAT_THE_PLANE_SAYS)
    if entropy is not None:
        left_out = "is not drawn, since sentences were cut at `data.max_tokens`" if cut else "is drawn"
        page.say(f"The entropy of a sentence of the source, {entropy:.2f} nats, {left_out}.")
    page.figure(name, title)
    _tell_left_out(page, latent, drawn)


def information(page: Page, data: str, members: Sequence[Run], alone: bool) -> None:
    latent, yardsticks = _halves(members)
    key = _perplexity([*latent, *yardsticks])
    drawn = [run for run in latent if is_number(run.metric(key)) and is_number(run.metric("mi"))]
    if not drawn:
        return
    name, title = _named("perplexity-information", "Perplexity and information", data, alone)
    points = _points(drawn, latent, "mi", key)
    best = pareto_front(points)
    # By the point and not by its label, which may be the run's settings.
    on_front = [(point, run.name) for run, point in zip(drawn, points, strict=True) if point in best]
    on_front.sort(key=lambda one: (one[0].x, one[0].y))
    kind = "importance-weighted" if key == "iw_ppl" else "from the -ELBO"
    ceilings = [run.metric("mi_ceiling") for run in drawn if is_number(run.metric("mi_ceiling"))]
    figures.front(
        page.folder,
        name,
        title,
        f"{key}: perplexity a word, {kind}",
        points,
        [point for point, _ in on_front],
        max(ceilings, default=None),
        {label: run.metric(key) for label, run in _yardstick_labels(yardsticks) if is_number(run.metric(key))},
    )
    page.section("Perplexity and information", WHAT_THE_FRONT_SAYS)
    page.figure(name, title)
    names = listed(f"{number} {name}" for number, (_, name) in enumerate(on_front, 1))
    page.say(f"On the front, by `{key}` and `mi`, from the lowest MI on: {names}.")
    _tell_left_out(page, latent, drawn)


def _points(drawn: Sequence[Run], latent: Sequence[Run], x: str, y: str) -> list[Point]:
    """The runs by two of their metrics; many of them by name, in groups of what they differ in."""
    if len(latent) <= MANY:
        labels = runs.labels(latent)
        return [Point(labels[run.name], run.metric(x), run.metric(y)) for run in drawn]
    topics = runs.by_topic({run.name: run.settings for run in latent})
    group = {name: topic or "reference" for topic, names in topics.items() for name in names}
    return [Point(run.name, run.metric(x), run.metric(y), group[run.name]) for run in drawn]


def _halves(members: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs with a latent code, evaluated or not, and the yardsticks that were evaluated."""
    latent = [run for run in members if not run.is_yardstick]
    return latent, [run for run in members if run.is_yardstick and run.metrics is not None]


def _yardstick_labels(yardsticks: Sequence[Run]) -> list[tuple[str, Run]]:
    alone = len(yardsticks) == 1
    return [("language model" if alone else f"language model {run.name}", run) for run in yardsticks]


def _perplexity(members: Sequence[Run]) -> str:
    """`iw_ppl` if every evaluated run has it, on as many sentences; else `ppl`: the two are never mixed."""
    evaluated = [run for run in members if run.metrics is not None]
    sizes = {run.metric("iw_sentences") for run in evaluated}
    whole = all(is_number(run.metric("iw_ppl")) for run in evaluated)
    return "iw_ppl" if whole and len(sizes) == 1 else "ppl"


def _entropy_nats(run: Run) -> float | None:
    """The entropy of a sentence of the source, where that is known: of the grammar."""
    if is_number(run.metric("entropy_nats")):
        return float(run.metric("entropy_nats"))
    if run.config.data.corpus != "grammar":
        return None
    from vae_ds.data import corpora

    return corpora.grammar.entropy_nats()


def _tell_left_out(page: Page, latent: Sequence[Run], drawn: Sequence[Run]) -> None:
    left = [run.name for run in latent if run not in drawn]
    if left:
        page.say(f"Not drawn, for want of a finite number: {listed(left)}.")


def _named(name: str, title: str, data: str, alone: bool) -> tuple[str, str]:
    """A figure's file name and title; they have the data's name where there are several data sets."""
    if alone:
        return name, title
    return f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')}", f"{title}: {data}"
