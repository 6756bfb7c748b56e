"""Sums by name: what each rank adds, over all ranks, in one reduction."""

import pytest
import torch

from support.launch import launch
from vae_ds.distributed import NamedSums

CODE = """
import torch
from vae_ds import distributed
ranks = distributed.start()
sums = distributed.NamedSums(ranks.device, loss=1, kl_L=3, requests=2)
calls = []
real = torch.distributed.all_reduce
torch.distributed.all_reduce = lambda *arguments: (calls.append(1), real(*arguments))[1]
sums.add(loss=torch.tensor(1.5 + ranks.rank), kl_L=torch.tensor([1.0, 2.0, 3.0]))
sums.add(loss=2, requests=[ranks.rank, 1.0])
totals = {name: total.tolist() for name, total in sums.reduce().items()}
assert totals == {"loss": [8.0], "kl_L": [2.0, 4.0, 6.0], "requests": [1.0, 2.0]}, totals
assert len(calls) == 1, calls
distributed.finish()
"""


@pytest.mark.timeout(240)
def test_sums_of_two_ranks_in_one_reduction() -> None:
    launch(["-c", CODE], processes=2, timeout_s=100)


def test_sums_are_float64_and_without_a_graph() -> None:
    sums = NamedSums(torch.device("cpu"), loss=1)
    weight = torch.ones(1, requires_grad=True)
    for _ in range(3):
        sums.add(loss=weight * 0.1)
    total = sums.reduce()["loss"]
    assert total.dtype == torch.float64
    assert not total.requires_grad
    assert float(total) == 3 * float(torch.tensor(0.1).double())


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        NamedSums(torch.device("cpu"), loss=1).add(los=torch.ones(1))
