"""`vae-ds bench speed` in its quick size: every measure runs, in this process where it can, and the table tells it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support.launch import launch
from vae_ds import cli
from vae_ds import config as configuration
from vae_ds.bench.contest import Here, Round, Tick, alternate, middle, ratio
from vae_ds.bench.contestants import make, published_loss, recipe
from vae_ds.bench.profiles import PROFILES, lengths
from vae_ds.bench.speed import MEASURES, speed, table
from vae_ds.bench.speed_other import _bias, _cpu_s, _cut
from vae_ds.bench.speed_rows import Place, Row
from vae_ds.config import RunConfig
from vae_ds.data import Batch, Limits, epoch_batches, limits_of
from vae_ds.errors import ConfigError, Failed
from vae_ds.model import T5VAE, count_operations

pytestmark = pytest.mark.timeout(400)


def test_every_measure_has_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "speed", "--quick", "--run-dir", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = told["rows"]
    assert {row["measure"] for row in rows} == set(MEASURES)
    for row in rows:
        assert (row["value"] is None) == bool(row["reason"]), row
    # What cannot be measured here says why.
    empty = {row["measure"]: row["reason"] for row in rows if row["value"] is None}
    assert empty["ranks"] == empty["start"] == empty["compile"] == "not in the quick size"
    assert any("GPU" in row["reason"] for row in rows if row["measure"] == "mfu")
    # The parts of a step are a missed goal's breakdown; those of a plain loop are all of its step.
    parts = next(row["facts"] for row in rows if row["measure"] == "published")
    told_parts = [parts[f"published_share_{name}"] for name in ("forward", "backward", "update")]
    assert sum(told_parts) == pytest.approx(1, abs=1e-3)
    assert min(*told_parts, parts["share_forward"], parts["share_update"]) > 0
    # One pair says nothing about the spread.
    assert all(row["is_noisy"] for row in rows if row["measure"] == "published")
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == rows
    assert told["facts"]["packages"]["torch"] == torch.__version__
    assert told["facts"]["date"]
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json"}


def test_the_terminal_shows_the_measure_that_runs(tmp_path: Path) -> None:
    words = ["bench", "speed", "--quick", "--only", "padding", "--run-dir", tmp_path]
    assert "bench speed: padding\n" in launch(["-m", "vae_ds", *words], processes=1).output


def test_a_wrong_measure_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only sped: the measures are published, memory"):
        speed(tmp_path, only=["sped"])


def test_a_process_that_ends_is_a_row_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other measures go on."""

    def broken(place: Place) -> list[Row]:
        spec = place.spec("no such kind", "snli", batch=2, shape="shipped")
        with Place(place.folder).host({"one": spec}, "broken") as host:
            host.go("one", 1)
        return []

    monkeypatch.setitem(MEASURES, "loop", broken)
    facts, rows = speed(tmp_path, only=["loop"], is_quick=True)
    assert rows[0].value is None
    assert "a process of the measurement ended" in rows[0].reason
    assert "a process of the measurement ended" in table(facts, rows)


def test_the_cost_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    spent_s, told = _cpu_s([sys.executable, "-c", "print(sum(range(3_000_000)))"])
    assert 0.01 < spent_s < 10
    assert told == "4499998500000\n"
    with pytest.raises(Failed, match="a process of the measurement ended: no such thing"):
        _cpu_s([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    # The measure before has made this process a rank.
    monkeypatch.setenv("MASTER_PORT", "33665")
    assert _cpu_s([sys.executable, "-c", "import os; print(os.environ.get('MASTER_PORT'))"])[1] == "None\n"


class Clock:
    """Contestants that take a time of their own, in a machine that becomes slower."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.slow = 1.0

    def of(self, name: str, seconds: float):
        while True:
            self.order.append(name)
            self.slow *= 1.05
            yield Tick(seconds * self.slow, 1, 10.0)


def test_turns_cancel_what_slows_all() -> None:
    clock = Clock()
    with Here({"a": clock.of("a", 2.0), "b": clock.of("b", 1.0)}) as host:
        found = alternate({"a": host, "b": host}, {"a": 1, "b": 1}, rounds=6, warm=0)
    assert "".join(clock.order) == "abba" * 3
    value = ratio(found["a"], found["b"], lambda one: one.seconds)
    assert value.value == pytest.approx(2.0, rel=0.06)
    assert value.of == 6
    assert not value.is_noisy


def test_a_spread_is_noise() -> None:
    assert middle([1.0, 1.01, 0.99, 1.0]).is_noisy is False
    assert middle([1.0, 1.4, 0.8, 1.1]).is_noisy is True
    assert middle([1.0]).is_noisy is True


def test_compile_is_asked_for_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself takes minutes, so its steps are those of the loop as it is."""
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: asked.append(how))
    spec = Place(tmp_path, is_quick=True).spec("bare", "ptb", batch=2)
    for how, blocks in (({}, 0), ({"compile": True}, 8)):
        assert next(make(spec | how)).tokens > 0
        assert asked == [{"dynamic": True}] * blocks


def test_the_baseline_pads_everything_and_counts_it(tmp_path: Path) -> None:
    """If it did not, the ratio would be about 1; if its padding did not count, its goal would be."""
    place = Place(tmp_path, is_quick=True)
    spec = place.spec("published", "snli", batch=4)
    settings = recipe(spec).model.model_copy(update={"injection": "self_attention"})
    operations = count_operations(T5VAE.from_base(settings, 0))
    padded, plain = next(make(spec)), next(make(place.spec("bare", "snli", batch=4)))
    width = spec["width"]
    sums = {"rows": 4, "source": 4 * width, "target": 4 * width}
    sums |= {"source_squared": 4 * width**2, "target_squared": 4 * width**2}
    assert padded.operations == operations.of(sums)
    assert padded.operations > 1.3 * plain.operations
    assert padded.tokens == plain.tokens


def test_the_loss_of_the_baseline_reads_z(tmp_path: Path) -> None:
    place = Place(tmp_path, is_quick=True)
    settings = recipe(place.spec("published", "snli", batch=4)).model
    model = T5VAE.from_base(settings.model_copy(update={"injection": "self_attention", "dropout": 0.0}), 0)
    ids_BT = torch.arange(2, 12).view(2, 5)
    eps_BL = torch.zeros(2, model.latent_dim)
    one = Batch(ids_BT[:, 0], ids_BT, torch.ones_like(ids_BT), ids_BT, eps_BL, torch.ones(2), 10)
    other = Batch(ids_BT[:, 0], ids_BT, torch.ones_like(ids_BT), ids_BT, eps_BL + 3, torch.ones(2), 10)
    assert published_loss(model, one) != published_loss(model, other)


def test_padding_and_balance_are_counted() -> None:
    """Two ranks, sentences of 4, 4, 2 and 2 tokens: each rank has one length, so no padding and 8 against 4."""
    lengths_N = np.array([4, 2, 4, 2])
    padded, behind = _cut(np.array([[0, 1, 2, 3]]), lengths_N, Limits(8), 2)
    assert padded == 0.0
    assert behind == pytest.approx(100 * (8 / 6 - 1))
    assert _bias(np.repeat(lengths_N, 200), 32) < 10


@pytest.mark.parametrize("profile", PROFILES)
def test_one_rank_pads_less_than_three_percent(profile: str) -> None:
    """A rank of one has the whole batch in one pass, so nothing but the buckets saves padding."""
    config = configuration.load(RunConfig, profile, ["batch.global=64"])
    lengths_N = lengths(profile, 20_000)
    order_SG = epoch_batches(lengths_N, 64, config.batch.bucket_batches, 0, 0, 0)
    limits = limits_of(config.batch, 1, PROFILES[profile].max_tokens)
    assert _cut(order_SG, lengths_N, limits, 1)[0] < 3


def test_rounds_are_sums() -> None:
    with Here(
        {"a": (tick for tick in [Tick(1.0, 2, 3.0, 4.0, {"x": 0.5}), Tick(2.0, 2, 3.0, 4.0, {"x": 0.7})])}
    ) as host:
        (found,) = alternate({"a": host}, {"a": 2}, rounds=1, warm=0)["a"]
    assert found == Round(3.0, 4, 6.0, 8.0, {"x": pytest.approx(0.6)})
