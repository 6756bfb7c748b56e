"""The soak: ranks that are killed again and again, and how much memory a rank gains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from support.recipes import STEPS, small_recipe
from vae_ds.bench import soak as bench
from vae_ds.errors import ConfigError, Failed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("soak"))


@pytest.mark.timeout(600)
def test_the_soak_kills_resumes_and_compares(recipe: Path, tmp_path: Path) -> None:
    found = bench.soak(
        str(recipe), tmp_path / "soak", overrides=["phases.1.steps=100"], processes=2, kill_every_s=3.0, seed=3
    )
    assert found.same_weights is True
    assert found.kills >= 1
    assert found.steps == STEPS // 2 + 100
    stretches = json.loads((tmp_path / "soak" / "stretches.json").read_text(encoding="utf-8"))
    assert [one["rank_killed"] is not None for one in stretches] == [True] * found.kills + [False]
    assert stretches[-1]["validated_step"] == found.steps
    assert json.loads((tmp_path / "soak" / "soak.json").read_text(encoding="utf-8"))["kills"] == found.kills


def test_a_soak_of_no_recipe_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe `demmo` \(did you mean `demo`\?\)"):
        bench.soak("demmo", tmp_path / "soak")
    assert not (tmp_path / "soak").exists()


def test_a_soak_whose_ranks_fail_says_where_to_read_why(recipe: Path, tmp_path: Path) -> None:
    settings = ["data.corpus=text", f"data.path={tmp_path / 'nothing'}"]
    with pytest.raises(Failed, match=r"the ranks exited before the run was done, without a kill; see .*output\.log"):
        bench.soak(str(recipe), tmp_path / "soak", overrides=settings)
    assert "nothing" in (tmp_path / "soak" / "output.log").read_text(encoding="utf-8")


def test_the_memorys_slope_is_that_of_the_worst_rank_within_stretches() -> None:
    def stretch(level: float) -> bench.Stretch:
        samples = [(step, [level + 50 * (step < 600), level + 0.002 * step]) for step in range(500, 2000, 50)]
        samples[-2][1][0] += 40  # a sample full of a validation
        return bench.Stretch(first_step=500, validated_step=540, last_step=2000, samples=samples)

    assert bench.memory_slope([stretch(100.0), stretch(500.0)], warm_steps=100) == pytest.approx(2.0)
    assert bench.memory_slope([stretch(100.0)], warm_steps=1400) is None
    late = replace(stretch(100.0), validated_step=590)
    assert bench.memory_slope([late], warm_steps=0) == pytest.approx(2.0)
    assert bench.memory_slope([replace(late, validated_step=None)], warm_steps=0) is None
