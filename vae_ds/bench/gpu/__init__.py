"""`vae-ds bench gpu`: what only a GPU can prove, in parts that take minutes together, and its small half on a CPU.

`running` starts a process for each part (`worker`), which measures the cells of the part (`cells`, `measures`) and
writes their results (`results`, `tables`). `runs` has the trainings, `copies` sees what a step copies and waits for.
"""

from vae_ds.bench.gpu.running import check, listing
from vae_ds.bench.gpu.tables import markdown

__all__ = ["check", "listing", "markdown"]
