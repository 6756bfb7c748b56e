"""How long ranks wait: as long as rank 0 works, and not for one that is gone. NCCL must not be the first to give up."""

import pytest
import torch.distributed as dist

from support.launch import launch
from vae_ds import distributed

WORK = """
import multiprocessing, os, time, torch
from pathlib import Path
from datetime import timedelta
from vae_ds import distributed
from vae_ds.distributed import patience, ranks
from vae_ds.errors import DataError, Lost, UserError
ranks.COLLECTIVE_TIMEOUT = timedelta(seconds=6)
patience.IDLE_S, patience.BEAT_S = 4.0, 0.5
ranks = distributed.start()
"""


def test_preparing_may_take_longer_than_a_collective_may() -> None:
    """Tokenising a large text takes hours, on rank 0 alone; then its error reaches the others too."""
    code = f"""{WORK}
def compute():
    end = time.monotonic() + 8
    while time.monotonic() < end:
        pass
def read():
    for _ in range(20):
        with Path(torch.__file__).with_name("lib").joinpath("libtorch_python.so").open("rb") as file:
            file.read(2**22)
        time.sleep(0.4)
def by_workers():
    worker = multiprocessing.get_context("fork").Process(target=compute)
    worker.start()
    worker.join()
def busy():
    if ranks.is_main:
        work()
    return ranks.rank
for work in (compute, read, by_workers):
    assert distributed.rank0_first(busy) == ranks.rank
def wrong():
    busy()
    raise DataError("no text")
try:
    distributed.rank0_first(wrong)
    raise AssertionError("must not pass")
except UserError as error:
    assert str(error) == "no text"
distributed.finish()
"""
    launch(["-c", code], timeout_s=150)


@pytest.mark.parametrize(
    ("fate", "told"),
    [("time.sleep(60)", "has done nothing for 4 s"), ("time.sleep(3) or os._exit(9)", "rank 0 has ended")],
)
def test_a_rank_0_that_hangs_or_ends_is_not_waited_for(fate: str, told: str) -> None:
    code = f"""{WORK}
try:
    distributed.rank0_first(lambda: ({fate}) if ranks.is_main else None)
except Lost as error:
    print("LOST", error, flush=True)
    os._exit(69)
"""
    done = launch(["-c", code], timeout_s=100, check=False)
    assert done.codes[1] == 69, done.report()
    assert told in done.outputs[1]


def test_the_time_out_reaches_groups_that_others_made() -> None:
    """DeepSpeed's own groups have NCCL's default of ten minutes, whatever the process group was begun with."""
    code = """
from datetime import timedelta
import torch, torch.distributed as dist
from vae_ds import distributed
from vae_ds.config import TimeoutConfig
from vae_ds.runtime import StopFlag
from vae_ds.training import Watch
ranks = distributed.start()
with Watch(ranks, StopFlag(), TimeoutConfig(stalled_s=7000, silent_s=200)):
    later = dist.new_group([0, 1])
    distributed.apply_timeout()
    for group in (dist.group.WORLD, later):
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=7500), options._timeout
distributed.finish()
"""
    launch(["-c", code], timeout_s=100)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (dist.DistBackendError("NCCL error ...\nncclRemoteError: A call failed possibly due to a network error"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"), False),
        (RuntimeError("ncclRemoteError"), False),
    ],
)
def test_what_nccl_says_of_others_is_a_loss(error: Exception, is_loss: bool) -> None:
    assert distributed.is_loss(error) is is_loss


def test_a_rank_whose_peer_ends_knows_that_it_is_not_the_cause() -> None:
    code = """
import os, torch, torch.distributed as dist
from vae_ds import distributed
ranks = distributed.start()
dist.all_reduce(torch.ones(1))
if not ranks.is_main:
    os.abort()
try:
    dist.all_reduce(torch.ones(1))
except Exception as error:
    assert distributed.is_consequence(error), error
    assert not distributed.is_loss(error)
    os._exit(5)
"""
    done = launch(["-c", code], timeout_s=100, check=False)
    assert done.codes[0] == 5, done.report()
    assert not distributed.is_consequence(RuntimeError("Connection closed by peer"))
