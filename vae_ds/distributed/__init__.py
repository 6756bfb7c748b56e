"""The ranks of a run: the process group, collectives, and random numbers that do not depend on the ranks.

Depends on `runtime` and `errors`.
"""

from vae_ds.distributed.agent_store import note_end
from vae_ds.distributed.collectives import (
    NamedSums,
    all_sum,
    barrier,
    broadcast_object,
    first_fault,
    gather_objects,
    gather_on_main,
    gather_rows,
    rank0_first,
    to_device,
)
from vae_ds.distributed.patience import apply_timeout, is_consequence, is_loss, set_timeout
from vae_ds.distributed.randomness import capture, restore, seed_everything, stream
from vae_ds.distributed.ranks import (
    VARIABLES,
    Ranks,
    finish,
    interface_to,
    open_store,
    part,
    start,
)

__all__ = [
    "VARIABLES",
    "NamedSums",
    "Ranks",
    "all_sum",
    "apply_timeout",
    "barrier",
    "broadcast_object",
    "capture",
    "finish",
    "first_fault",
    "gather_objects",
    "gather_on_main",
    "gather_rows",
    "interface_to",
    "is_consequence",
    "is_loss",
    "note_end",
    "open_store",
    "part",
    "rank0_first",
    "restore",
    "seed_everything",
    "set_timeout",
    "start",
    "stream",
    "to_device",
]
