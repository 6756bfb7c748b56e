"""The memory that a plan expects of a training step, against the peak of a real step."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import no_rank
from support.tiny import make_base

TOKENS, SENTENCES = 48, 16
# So large that the libraries' own memory does not matter: 10 M parameters.
SHAPE = {"d_model": 320, "d_kv": 40, "d_ff": 1280, "num_heads": 8, "num_layers": 3, "num_decoder_layers": 3}
# In a process of its own, which has trained another model before: what a first engine imports does not count.
STEP = """
import gc, re, sys, torch
from vae_ds import authoring, distributed
from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.engine import PhaseEngine, resolve
from vae_ds.model import T5VAE

small, base, stage, sentences, tokens = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
ranks = distributed.start()

def bytes_of(name):
    return 1024 * int(re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1])

def step(engine, count):
    ids_BT = torch.randint(3, 50, (count, tokens))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -1] = 0
    for is_last in (False, True):
        terms = engine.forward(ids_BT, mask_BT, ids_BT, torch.zeros(count, 32))
        engine.backward(terms.rec_B.sum() + terms.kl_BL.sum(), is_last)
        del terms
        engine.step(1e-3)

def build(base):
    settings = [f"model.base={base}", "model.latent_dim=32", f"deepspeed={stage}", f"data.max_tokens={tokens}"]
    config = configuration.load(RunConfig, "demo", settings)
    model = T5VAE.from_base(config.model).train()
    optimizer, ds_config = config.phases[-1].optimizer, resolve(stage, "fp32")
    return config, PhaseEngine(model, optimizer=optimizer, ranks=ranks, precision="fp32", ds_config=ds_config)

_, first = build(small)
step(first, 1)
first.close()
del first
gc.collect()
before = bytes_of("VmRSS")
config, engine = build(base)
step(engine, 1)  # the moments exist after the first step
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
step(engine, sentences)
peak = bytes_of("VmHWM") - before
need = authoring.needs(config, "fp32", 1, sentences)[-1]
print(peak, need.states_bytes + need.activations_bytes)
sys.stdout.flush()
import os; os._exit(0)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["zero0", "zero1"])
def test_the_peak_of_a_real_step(stage: str, tmp_path: Path) -> None:
    small, base = make_base(tmp_path / "small"), make_base(tmp_path / "base", **SHAPE, vocab_size=8000)
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    words = [str(small), str(base), stage, str(SENTENCES), str(TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", STEP, *words],
        capture_output=True,
        text=True,
        env=no_rank() | allocator | {"PYTHONPATH": ":".join(sys.path)},
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured, expected = map(float, done.stdout.split()[-2:])
    assert measured == pytest.approx(expected, rel=0.1)
