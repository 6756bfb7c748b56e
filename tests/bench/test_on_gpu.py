"""The GPU check in small, on the GPU of this machine, in this process. Skipped without one."""

from pathlib import Path

import pytest

from vae_ds.bench import gpu
from vae_ds.bench.gpu import cells, measures, runs
from vae_ds.bench.gpu.cells import Cell

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> measures.Place:
    return measures.Place(tmp_path_factory.mktemp("gpu"), runs.SCALES["cpu"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same steps on the CPU."""
    found = gpu.check(tmp_path_factory.mktemp("reference"), only=[cells.REFERENCE], cpu=True)
    (result,) = found.values()
    losses: list[float] = result["values"]["losses"]
    return losses


@pytest.mark.parametrize("ds_config", ["zero0_fp32", "zero1_bf16", "zero2_fp16", "zero3_bf16", "zero2_bf16_offload"])
def test_the_losses_are_those_of_the_cpu(ds_config: str, place: measures.Place, reference: list[float]) -> None:
    precision = ds_config.split("_")[1]
    found = measures.measure(Cell(f"curves-{precision}", ds_config, 1), place)
    tolerance = cells.AFTER_SKIPS if found["skipped_steps"] else cells.TOLERANCES[precision]
    far = cells.difference(found["losses"], reference)
    assert far is not None
    assert far < tolerance


@pytest.mark.parametrize("ds_config", ["zero1_bf16", "zero3_bf16"])
def test_a_step_waits_once(ds_config: str, place: measures.Place) -> None:
    found = measures.measure(Cell("waits", ds_config, 1), place)
    assert found["to_host"] == 1, found["copies_at"]


def test_a_run_resumes_at_another_stage(place: measures.Place) -> None:
    found = measures.measure(Cell("resume", "fp32 zero1 to zero3", 1), place)
    assert found["difference"] < found["tolerance"]


@pytest.mark.parametrize("name", ["metrics", "texts"])
def test_the_evaluation_is_that_of_the_cpu(name: str, place: measures.Place) -> None:
    found = measures.measure(Cell("evaluation", name, 1), place)
    if name == "metrics":
        assert found["difference"] < found["tolerance"]
    else:
        assert found["equal_texts"] >= found["texts"] - 1


def test_speed_and_peak_have_values(place: measures.Place, tmp_path: Path) -> None:
    assert measures.measure(Cell("speed", "tiny snli bf16", 1), place)["mfu"] > 0
    assert measures.measure(Cell("memory", "tiny zero1_bf16", 1), place)["peak_gb"] > 0
