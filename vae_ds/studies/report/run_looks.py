"""Colour, marker and legend entry of each run: the same in every figure of a report.

Up to six runs have a colour each. More runs are grouped by what they change: a group has one colour, and its runs have
shades of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vae_ds.studies import figures, runs, setting_words
from vae_ds.studies.runs import Run

REFERENCE = setting_words.topic_words("")


@dataclass(frozen=True)
class Look:
    """How a run is drawn. `group` is what it changes, in words; None where each run has a colour of its own."""

    colour: str
    marker: str
    group: str | None = None
    group_colour: str | None = None


def looks(latent: Sequence[Run]) -> dict[str, Look]:
    """A look by the name of each run."""
    if len(latent) <= len(figures.COLOURS):
        return {run.name: Look(figures.shade(n, None), figures.MARKERS[n]) for n, run in enumerate(latent)}
    settings = {run.name: run.settings for run in latent}
    topics, keys = runs.by_topic(settings), runs.differing(list(settings.values()))
    found = {name: Look(figures.BLACK, figures.REFERENCE_MARKER, REFERENCE) for name in topics.pop("")}
    # The groups with the most runs get the colours that are easiest to distinguish.
    for hue, (topic, names) in enumerate(sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))):
        marker, words = figures.MARKERS[hue % len(figures.MARKERS)], setting_words.topic_words(topic)
        own_keys = [key for key in keys if setting_words.topic(key) == topic]
        # In the order of the curves in a figure of the topic, so that the curves of a panel have different shades.
        labels = {name: setting_words.label(settings[name], own_keys) or name for name in names}
        for number, name in enumerate(sorted(names, key=lambda name: figures.natural_order(labels[name]))):
            found[name] = Look(
                figures.shade(hue, number if len(names) > 1 else None), marker, words, figures.shade(hue, None)
            )
    return found
