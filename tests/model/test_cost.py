"""The memory of a pass, without numbers, against a real pass."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny import make_base
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE, footprint

SENTENCES, TOKENS = 16, 48
WIDE = {"d_model": 160, "d_kv": 32, "d_ff": 512, "num_heads": 6, "num_layers": 3, "vocab_size": 4000}
# In a process of its own: what other tests have left to the allocator would hide the peak.
PEAK = """
import gc, re, sys, torch
from vae_ds.config import ModelConfig
from vae_ds.model import T5VAE

def line(name):
    return 1024 * int(re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1])

base, checkpointing, sentences, tokens = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
model = T5VAE.from_base(ModelConfig(base=base, gradient_checkpointing=checkpointing)).train()
for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

def run(count):
    ids_BT = torch.randint(3, 50, (count, tokens))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, -1] = 0
    terms = model(ids_BT, mask_BT, ids_BT, torch.zeros(count, model.latent_dim))
    (terms.rec_B.sum() + terms.kl_BL.sum()).backward()

run(1)  # loads the kernels
gc.collect()
before = line("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
run(sentences)
print(line("VmHWM") - before)
"""


def wide(folder: Path) -> str:
    return str(make_base(folder / "base", **WIDE))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_real_pass(checkpointing: bool, tmp_path: Path) -> None:
    settings = ModelConfig(base=wide(tmp_path), gradient_checkpointing=checkpointing)
    words = [settings.base, str(checkpointing), str(SENTENCES), str(TOKENS)]
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True, env=env | _path(), timeout=250
    )
    assert footprint(settings, SENTENCES, TOKENS).peak_bytes == pytest.approx(int(done.stdout), rel=0.1)


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


def test_half_the_bytes_and_the_part_of_the_logits(tmp_path: Path) -> None:
    settings = ModelConfig(base=wide(tmp_path))
    whole, half = (footprint(settings, 4, TOKENS, precision) for precision in ("fp32", "bf16"))
    vocabulary = T5VAE.from_base(settings).t5.config.vocab_size
    # Logits, their softmax, and the gradient of the logits.
    assert whole.logits_bytes == 3 * 4 * 4 * TOKENS * vocabulary
    assert half.peak_bytes < whole.peak_bytes
    assert footprint(settings, 8, TOKENS).peak_bytes == pytest.approx(2 * whole.peak_bytes, rel=0.02)


def test_checkpointed_logits_are_in_memory_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelConfig(base=wide(tmp_path), gradient_checkpointing=True)
    whole = footprint(settings, 4, TOKENS)
    monkeypatch.setattr("vae_ds.model.token_losses.LOGITS_AT_ONCE", whole.logits_bytes // 3 // 4 // 8)
    cut = footprint(settings, 4, TOKENS)
    assert cut.logits_bytes <= whole.logits_bytes / 4
    assert cut.peak_bytes < whole.peak_bytes


def test_a_plain_language_model_has_a_footprint(tmp_path: Path) -> None:
    plain = footprint(ModelConfig(base=wide(tmp_path), injection="none"), 2, TOKENS)
    assert 0 < plain.peak_bytes < footprint(ModelConfig(base=wide(tmp_path)), 2, TOKENS).peak_bytes
