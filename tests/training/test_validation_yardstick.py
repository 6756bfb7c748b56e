"""The cost of the code during training, beside a plain language model on the same validation sentences."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.tiny import demo_settings
from vae_ds.errors import CheckpointError, ConfigError, DataError
from vae_ds.evaluation import finished_run
from vae_ds.runtime import evaluations
from vae_ds.training import train

SHORT = ["logging.tensorboard=false", "export=last", "validation.sentences=30", "validation.every_steps=4"]


@pytest.mark.timeout(480)
def test_each_validation_states_what_the_code_costs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = [*demo_settings(tmp_path), *SHORT]
    plain = train("demo-yardstick", tmp_path / "plain", [*settings, "phases.0.steps=4"])
    vae, two = tmp_path / "vae", ["phases.0.steps=4", "phases.1.steps=4"]
    beside = [*settings, *two, f"validation.yardstick={plain}"]
    with pytest.raises(CheckpointError, match=r"eval-valid\.json: no such file; write it with `vae-ds evaluate"):
        train("demo", vae, beside)
    few = {"iw_samples": 2, "iw_sentences": 3, "bleu_sentences": 0, "samples": 0}
    finished_run.evaluate_run(plain, "valid", few)
    with pytest.raises(DataError, match="cannot be compared with demo: it has other lengths of the kept text"):
        train("demo", vae, [*beside, "data.max_tokens=7"])
    assert not vae.exists()

    train("demo", vae, [*beside, "logging.progress=true"])
    rows = [json.loads(row) for row in (vae / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    nll_N = evaluations.read_values(plain, "valid")["rec"][:30]
    for row in rows:
        assert row["nelbo_above_yardstick"] == pytest.approx(row["nelbo"] - nll_N.mean(), rel=1e-5)
        assert row["lm_gain"] == pytest.approx(nll_N.mean() - row["rec"], rel=1e-5)
        assert 0 < row["nelbo_above_yardstick_se"] < np.hypot(row["nelbo_se"], nll_N.std() / 30**0.5)
        assert row["cost"].startswith("at most ")
    told = capfd.readouterr().err
    assert f"{rows[-1]['verdict']}, {rows[-1]['cost']}" in told
    with pytest.raises(ConfigError, match="vae has injection `self_attention`; a yardstick must be a run with `none`"):
        train("demo", tmp_path / "other", [*settings, f"validation.yardstick={vae}"])
