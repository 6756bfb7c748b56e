"""Run training jobs one after the other in one process group: `train_jobs.py JOBS.json`, on each rank.

The format of a job is {"recipe": FILE, "run_dir": DIR, "overrides": [...], "stop_at": step or null, "kill_at": step or
null}. A job with `stop_at` sends SIGTERM to the last rank once this step is logged, and must raise Stopped. One with
`kill_at` sends it SIGKILL. Finally, rank 0 prints ENDED.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from vae_ds import distributed
from vae_ds.errors import Stopped
from vae_ds.training import trainer


def signal_at(step: int, run_dir: Path, number: int) -> None:
    """Wait until the run has logged `step`, then send a signal to this process."""
    metrics = run_dir / "metrics.jsonl"
    while True:
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        if rows and rows[-1].endswith("}") and json.loads(rows[-1])["step"] >= step:
            os.kill(os.getpid(), number)
            return
        time.sleep(0.002)


def main() -> None:
    ranks = distributed.start()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run_dir = Path(job["run_dir"])
        stop_at = job.get("stop_at")
        for step, number in ((stop_at, signal.SIGTERM), (job.get("kill_at"), signal.SIGKILL)):
            if step is not None and ranks.rank == ranks.world - 1:
                threading.Thread(target=signal_at, args=(step, run_dir, number), daemon=True).start()
        try:
            trainer.train(job["recipe"], run_dir, job["overrides"])
            stopped = False
        except Stopped:
            stopped = True
        if stopped != (stop_at is not None):
            raise RuntimeError(f"{run_dir}: stopped is {stopped}")
    distributed.barrier()
    if ranks.is_main:
        print("ENDED", flush=True)


main()
sys.stdout.flush()
# A native thread of gloo can abort an interpreter that ends normally.
os._exit(0)
