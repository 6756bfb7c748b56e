"""A process of the GPU check: python -m vae_ds.bench.gpu.worker TO SCALE UNTIL CELL... measures cells, one by one.

TO is the directory of the results, SCALE `gpu` or `cpu`, UNTIL the time at which no further cell may end later, in
seconds since the epoch. Each result is written at once. After an error of CUDA, the process ends: its device is lost.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from vae_ds.bench.gpu import cells, measures, results, runs
from vae_ds.errors import UserError
from vae_ds.runtime import records

EXIT_DEVICE_LOST = 3


def main(to: Path, scale: str, until_s: float, ids: list[str]) -> int:
    """Measure these cells. Returns the exit code."""
    known = {cell.id: cell for cell in cells.cells(scale == "cpu")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = to / "work"
    place = measures.Place(folder, runs.SCALES[scale])
    folder.mkdir(parents=True, exist_ok=True)
    for cell in (known[one] for one in ids):
        left_s = until_s - time.time()
        if left_s < cell.expected_s:
            results.skipped(to, cell, f"{max(0.0, left_s):.0f} s were left, {cell.expected_s:g} s are expected")
            continue
        records.write_json(to / results.CURRENT, {"cell": cell.id, "began_s": time.time()})
        began_s = time.monotonic()
        try:
            values = measures.measure(cell, place)
        except UserError as error:
            # This machine cannot do it, such as a ds_config for NVMe without libaio.
            results.skipped(to, cell, str(error))
        except Exception as error:
            results.failed(to, cell, error, time.monotonic() - began_s)
            if "CUDA error" in str(error):
                return EXIT_DEVICE_LOST
        else:
            results.done(to, cell, json.loads(records.strict_json(values)), time.monotonic() - began_s, device)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    # The ends of DeepSpeed's threads can abort a process that has done its work.
    os._exit(code)
