"""The figures: labels do not overlap, a panel has six lines at most, outliers are named, settings are words."""

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from vae_ds.config import RunConfig
from vae_ds.studies import figures, runs, setting_words
from vae_ds.studies.figures import curves, label_placement, planes, style
from vae_ds.studies.figures.curves import Curve
from vae_ds.studies.figures.label_placement import Box, Label
from vae_ds.studies.figures.planes import Point

README_LIMIT_BYTES = 100_000


def texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


# Label placement


def crowd(count: int) -> tuple[list[Label], list[Box], Box]:
    """Points in a heap in the middle of a figure, with their labels."""
    numbers = random.Random(count)
    places = [(numbers.gauss(400, 60), numbers.gauss(250, 40)) for _ in range(count)]
    labels = [Label(x, y, numbers.uniform(30, 120), 10.0) for x, y in places]
    return labels, [Box(x, y, x, y).grown(5) for x, y in places], Box(0, 0, 800, 500)


@pytest.mark.parametrize("count", [1, 5, 12, 25])
def test_labels_overlap_neither_each_other_nor_points(count: int) -> None:
    labels, points, bounds = crowd(count)
    placed = label_placement.place(labels, points, [(0, 250, 800, 250)], bounds)
    pairs = [(label, box) for label, box in zip(labels, placed, strict=True) if box is not None]
    boxes = [box for _, box in pairs]
    # In the largest heap not every label finds room.
    assert len(boxes) == count if count < 25 else len(boxes) > 20
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(point) for box in boxes for point in points)
    assert all(bounds.contains(box) for box in boxes)
    for label, box in pairs:
        assert (box.right - box.left, box.top - box.bottom) == pytest.approx((label.width, label.height))
        line = label_placement.leader(label, box)
        assert not any(other.is_crossed_by(line) for other in boxes if other is not box)


def test_labels_are_placed_the_same_again() -> None:
    labels, points, bounds = crowd(20)
    assert label_placement.place(labels, points, [], bounds) == label_placement.place(labels, points, [], bounds)


def test_a_label_without_room_is_left_out_and_the_first_comes_first() -> None:
    label = Label(20, 10, 22, 8)
    point = Box(20, 10, 20, 10).grown(5)
    first, second = label_placement.place([label, label], [point], [], Box(0, 0, 52, 20))
    assert first is not None
    assert second is None


def test_a_free_place_beside_the_point_avoids_a_line() -> None:
    (box,) = label_placement.place(
        [Label(50, 50, 30, 8)], [Box(45, 45, 55, 55)], [(50, 50, 200, 50)], Box(0, 0, 200, 200)
    )
    assert box is not None
    assert not box.is_crossed_by((50, 50, 200, 50))


# Curves


def curve(label: str, is_reference: bool = False, **values: Any) -> Curve:
    rows = tuple({"step": step, "mi": 3.0 + step, "au": 8, "kl": 5.0 + step} | values for step in range(1, 60))
    return Curve(label, rows, "#0072B2", is_reference)


@pytest.mark.parametrize("count", [1, 6, 7, 11, 24])
@pytest.mark.parametrize("has_reference", [True, False])
def test_a_panel_has_six_lines_at_most(count: int, has_reference: bool) -> None:
    every = [curve(f"free bits {n}", is_reference=has_reference and n == 3) for n in range(count)]
    rows = curves.split(every)
    assert all(0 < len(row) <= 6 for row in rows)
    assert len(rows) > 1 or count <= 6
    for one in every:
        assert sum(one in row for row in rows) == (len(rows) if one.is_reference else 1)


def test_labels_that_differ_in_numbers_share_a_row() -> None:
    modes = ("per unit", "in total", "per unit (batch mean)")
    every = [curve(f"free bits {nats}, {mode}") for nats in (6, 0.5, 3) for mode in modes] + [curve("reference", True)]
    rows = [[one.label for one in row] for row in curves.split(every)]
    assert [["reference", *(f"free bits {nats}, {mode}" for nats in (0.5, 3, 6))] for mode in sorted(modes)] == rows


def test_many_long_curves_stay_small(tmp_path: Path) -> None:
    every = [curve(f"free bits {n / 4:g}, denoising 0.{n}", kl=3.0 * n, au=n) for n in range(1, 25)]
    figures.phase(tmp_path, "many", "Many", every)
    assert (tmp_path / "many.png").stat().st_size < README_LIMIT_BYTES
    assert {one.label for one in every} <= set(texts(tmp_path / "many.svg"))


def test_active_units_that_never_change_are_a_note(tmp_path: Path) -> None:
    figures.phase(tmp_path, "same", "Same", [curve("a"), curve("b")])
    assert "active units: 8 at every validation" in texts(tmp_path / "same.svg")
    figures.phase(tmp_path, "other", "Other", [curve("a"), curve("b", au=7)])
    assert "active units" in texts(tmp_path / "other.svg")


def test_lines_of_a_panel_differ_in_grey_too() -> None:
    styles = [style.line(number) for number in range(curves.LINES)]
    for key in ("marker", "linestyle"):
        assert len({one[key] for one in styles}) == curves.LINES


def test_shades_of_all_colours_differ() -> None:
    shades = {style.shade(hue, number) for hue in range(len(style.COLOURS)) for number in range(len(style.SHADES))}
    assert len(shades) == len(style.COLOURS) * len(style.SHADES)
    assert style.shade(1, None) == style.COLOURS[1]


# Planes


def points(*ys: float) -> list[Point]:
    return [Point(f"run-{n}", float(n), y, "#0072B2", "o", "runs") for n, y in enumerate(ys)]


def test_an_outlier_is_beyond_the_axes_and_named(tmp_path: Path) -> None:
    every = points(60.0, 61.0, 60.5, 62.0, 61.5, 500_000.0)
    metrics = ("mi", "iw_nll")
    outliers = figures.perplexity_information(tmp_path, "p", "P", metrics, every, every[:1], None, {"lm": 59.0}, 13.0)
    assert [point.label for point in outliers] == ["run-5"]
    words = texts(tmp_path / "p.svg")
    assert "Beyond the axes, with (mi, iw_nll): run-5 (5.00, 500000.0)" in words
    assert {"run-0", "run-1", "runs", "lm: 59.0 nats", "perplexity per word (13.00 words per sentence)"} <= set(words)
    assert "run-5" not in words
    with Image.open(tmp_path / "p.png") as image:
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 8


def test_the_cost_is_drawn_with_its_errors_and_the_limit_of_the_information(tmp_path: Path) -> None:
    every = [Point(f"run-{n}", 7.0 + n, 2.0 - n, "#0072B2", "o", x_se=0.2, y_se=0.5) for n in range(3)]
    limit = figures.Limit(math.log(20_001), "(20,000 + 1)")
    names = ("mi_train", figures.ABOVE)
    figures.perplexity_information(tmp_path, "p", "P", names, every, every, limit, {"language model": 0.0}, 13.0)
    words = texts(tmp_path / "p.svg")
    assert {
        "language model",
        "limit of the estimate, ln (20,000 + 1): 9.90 nats",
        "mi_train: mutual information (nats)",
        "iw_nll minus that of the language model (nats per sentence)",
        "perplexity per word, relative to the language model",
    } <= set(words)
    # Three points with two bars each.
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert len(re.findall(r'<g id="LineCollection_\d+">', drawn)) == 6
    figures.perplexity_information(tmp_path, "q", "P", names, points(2.0, 1.0, 0.0), every, None, {}, None)
    assert "LineCollection" not in (tmp_path / "q.svg").read_text(encoding="utf-8")


def test_bars_are_inside_the_axes_unless_they_would_hide_the_points() -> None:
    with style.figure(4, 3) as figure:
        axes = figure.subplots()
        narrow = [Point("a", 1.0, 10.0, "#0072B2", "o", y_se=2.0), Point("b", 3.0, 20.0, "#0072B2", "o", y_se=500.0)]
        planes._set_limits(axes, narrow, [])
        low, high = axes.get_ylim()
        assert 0 <= low < 8.0
        assert 30.0 < high < 40.0


def test_what_is_no_outlier() -> None:
    assert planes.highest_shown([1.0, 2.0, 3.0, 50.0]) == 3.0
    # Few runs, evenly spread runs, and a run that costs less than half of the axis.
    assert planes.highest_shown([1.0, 50.0, 900.0]) == 900.0
    assert planes.highest_shown([1.0, 20.0, 40.0, 60.0]) == 60.0
    assert planes.highest_shown([0.0, 1.0, 10.0, 10.0, 10.0, 10.0, 15.0]) == 15.0
    assert planes.highest_shown([5.0] * 10) == 5.0


def test_axes_start_where_the_data_are() -> None:
    with style.figure(4, 3) as figure:
        axes = figure.subplots()
        planes._set_limits(axes, points(60.0, 70.0), [(0.5, 58.0)])
        assert axes.get_ylim() == pytest.approx((58 - 0.72, 70 + 0.72))
        # Never below 0 where no value is.
        assert axes.get_xlim() == pytest.approx((0, 1.06))


def test_a_point_that_is_not_notable_has_no_label(tmp_path: Path) -> None:
    every = points(5.0, 4.0, 3.0)
    hidden = Point("hidden", 1.5, 4.5, "#D55E00", "s", "others", is_named=False)
    assert figures.rate_distortion(tmp_path, "r", "R", [*every, hidden], {"lm": 6.0}, 5.0) == []
    words = texts(tmp_path / "r.svg")
    assert "hidden" not in words
    assert {"others", "run-1", "lm: 6.0 nats", "entropy of the source: 5.0 nats"} <= set(words)


# Settings in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"free_bits": {"nats": 0.5}}, "free bits 0.5"),
        ({"free_bits": {"nats": 0.5, "mode": "total"}}, "free bits 0.5, in total"),
        ({"beta": {"schedule": "constant", "value": 0.5}}, "constant beta 0.5"),
        ({"beta": {"schedule": "linear", "over_epochs": 10}}, "beta linear over 10 epochs"),
        (
            {"beta": {"schedule": "linear", "over_fraction": 0.5, "start": 0.1}},
            "beta linear from 0.1 over 50% of the phase",
        ),
        ({"beta": {"schedule": "cyclical", "cycles": 4, "zero": 0}}, "beta in 4 cycles"),
        ({"beta": {"schedule": "target", "kl": 16}}, "beta for a KL of 16"),
        ({"freeze": ["decoder", "embeddings"]}, "decoder + embeddings frozen"),
        ({"sample_posterior": False}, "z = posterior mean"),
        ({"reset_decoder": True}, "decoder reset"),
        ({"optimizer": {"weight_decay": 0.1}}, "optimizer weight decay 0.1"),
        ({"optimizer": {"new_weights_lr_factor": 2}}, "2 times the learning rate for the new weights"),
    ],
)
def test_a_legend_says_what_differs_in_words(change: dict[str, Any], words: str) -> None:
    usual = {"name": "full", "steps": 5, "beta": {"schedule": "constant", "value": 1}}
    every = [runs._settings(RunConfig.model_validate({"phases": [phase]})) for phase in (usual, usual | change)]
    assert setting_words.label(every[1], runs.differing(every)) == words


def test_settings_of_the_model_in_words() -> None:
    phases = [{"name": "full", "steps": 5}]
    every = [
        runs._settings(RunConfig.model_validate({"phases": phases, "model": model}))
        for model in ({}, {"pooling": "mean", "pool_layers": "all", "latent_dim": 64, "injection": "self_attention"})
    ]
    label = setting_words.label(every[1], runs.differing(every))
    assert set(label.split(", ")) == {"mean pooling", "all layers", "64 units", "z in self-attention"}
