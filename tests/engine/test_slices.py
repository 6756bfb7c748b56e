"""What a rank stores: equal shares, on real processes, and how elements are divided."""

import json
from pathlib import Path

import pytest
import torch

from support import slice_cases
from support.launch import launch
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.slices import shares

WORLD = 4


@pytest.mark.timeout(600)
def test_each_rank_stores_equally_much_and_needs_no_other_rank(tmp_path: Path) -> None:
    finished = launch([Path(slice_cases.__file__), tmp_path], processes=WORLD, timeout_s=560, check=False)
    for rank in range(WORLD):
        path = tmp_path / f"rank{rank}.json"
        answers = json.loads(path.read_text()) if path.is_file() else {}
        for case in slice_cases.cases():
            assert answers.get(case) == "ok", answers.get(case, f"not reached\n{finished.report()}")


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
def test_shares_cover_each_element_once(world: int) -> None:
    """Also if there are more ranks than elements, and parameters of one element or of none."""
    sizes = {"a": 13, "b": 1, "empty": 0, "c": 21}
    found = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
    lengths = []
    for rank in range(world):
        mine = shares(sizes, Ranks(rank, rank, world, torch.device("cpu")))
        for name, (offset, length) in mine.items():
            assert length > 0
            found[name][offset : offset + length] += 1
        lengths.append(sum(length for _, length in mine.values()))
    assert all(bool((count == 1).all()) for count in found.values())
    assert max(lengths) - min(lengths) <= 1
