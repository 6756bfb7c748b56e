"""Engines at every ZeRO stage and precision on two real processes, and the checks of ds_configs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine_cases
from launch import Finished, clean_environment, launch
from vae_ds import ds_config
from vae_ds.engine import PhaseEngine, precision_for, resolve
from vae_ds.errors import ConfigError
from vae_ds.runtime import Ranks
from vae_ds.settings import OptimizerConfig

PROCESSES = 2
# Half a minute on two free cores; on shared ones it took five.
pytestmark = pytest.mark.timeout(600)


class Session:
    """One launch of a precision's cases: its answers by rank, its output, and what it compiled."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.extensions = folder / "extensions"
        self.finished: Finished = launch(
            [Path(engine_cases.__file__), folder, precision],
            processes=PROCESSES,
            timeout_s=560,
            env={"TORCH_EXTENSIONS_DIR": str(self.extensions)},
            check=False,
        )
        paths = [folder / f"rank{rank}.json" for rank in range(PROCESSES)]
        self.answers = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]


@pytest.fixture(scope="module", params=engine_cases.PRECISIONS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("engine"), request.param)


@pytest.mark.parametrize(
    ("session", "case"),
    [(precision, case) for precision in engine_cases.PRECISIONS for case in engine_cases.cases(precision)],
    indirect=["session"],
    scope="module",
)
def test_case_on_two_ranks(session: Session, case: str) -> None:
    for answers in session.answers:
        assert answers.get(case) == "ok", answers.get(case, f"not reached\n{session.finished.report()}")


def test_processes_end_well_quietly_and_compile_nothing(session: Session) -> None:
    assert session.finished.codes == [0] * PROCESSES, session.finished.report()
    assert not list(session.extensions.glob("**/*"))
    chatter = [line for line in session.finished.output.splitlines() if line and not line.startswith("--- rank")]
    assert all("OVERFLOW" in line for line in chatter), chatter[:5]


def test_importing_the_room_does_not_import_deepspeed(tmp_path: Path) -> None:
    code = "import vae_ds.engine, sys; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(tmp_path), timeout=60, check=False)
    assert done.returncode == 0


def alone() -> Ranks:
    return Ranks(0, 0, 1, torch.device("cpu"))


def build(module: torch.nn.Module, precision: str = "fp32", **settings: Any) -> PhaseEngine:
    return PhaseEngine(
        module,
        optimizer=OptimizerConfig(),
        micro=1,
        accumulation=1,
        ranks=alone(),
        precision=precision,
        ds_config=settings or resolve("zero1", precision),
    )


def test_a_phase_that_freezes_everything_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build(torch.nn.Linear(2, 2).requires_grad_(False))


def test_a_module_that_is_not_float32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 weights on the CPU; `weight` is not"):
        build(torch.nn.Linear(2, 2).bfloat16())


def test_a_batch_size_of_the_file_that_is_not_the_recipes_is_named() -> None:
    with pytest.raises(ConfigError, match=r"`train_micro_batch_size_per_gpu` is 7, but the recipe owns it and says 1"):
        build(torch.nn.Linear(2, 2), train_micro_batch_size_per_gpu=7)


@pytest.mark.parametrize("name", ds_config.shipped_names())
def test_every_shipped_ds_config_says_auto_where_the_recipe_owns(name: str) -> None:
    tree = ds_config.read(ds_config.shipped_dir() / f"{name}.json")
    for key in ds_config.OWNED:
        assert ds_config.lookup(tree, key) in (None, "auto"), key
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert tree[key] == "auto"
    assert tree["gradient_clipping"] == "auto", "DeepSpeed's default is 1.0, drastic for a summed loss"
    stage, precision = name.removeprefix("zero").split("_")[:2]
    assert tree["zero_optimization"]["stage"] == int(stage)
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(ConfigError, match="this cpu cannot compute in fp16"):
            resolve(name, precision, "cpu")
        return
    found = resolve(name, precision, "cpu")
    assert found["bf16"]["enabled"] is (precision == "bf16")
    assert found["fp16"]["enabled"] is (precision == "fp16")


def test_all_stages_and_precisions_are_shipped_but_the_broken_one() -> None:
    names = {f"zero{stage}_{precision}" for stage in range(4) for precision in ds_config.PRECISIONS} - {"zero0_fp16"}
    assert names <= set(ds_config.shipped_names())
    assert "zero0_fp16" not in ds_config.shipped_names()


@pytest.mark.parametrize("name", ["zero2", "zero2_bf16", "zero2_bf16.json"])
def test_a_stage_a_shipped_name_and_a_shipped_file_are_the_same(name: str) -> None:
    spelt = str(ds_config.shipped_dir() / name) if name.endswith(".json") else name
    assert resolve(spelt, "bf16") == resolve("zero2", "bf16")


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("zero4", "fp32", r"found 'zero4'; use zero0, zero1, zero2 or zero3"),
        ("zero2_bf16", "fp32", r"zero2_bf16 is for bf16, but the run's precision is fp32; use zero2"),
        ("zero0", "fp16", r"fp16 does not work at ZeRO stage 0.*use precision bf16, or deepspeed zero1"),
        ("zero1_nowhere", "bf16", r"no ds_config zero1_bf16_nowhere is shipped"),
        ("missing.json", "fp32", r"missing\.json: no such file; shipped: zero0_bf16"),
    ],
)
def test_names_that_mean_no_file(name: str, precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, precision)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    def write(tree: Any) -> str:
        path = tmp_path / "mine.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return str(path)

    return write


WRONG = [
    ({"gradient_cliping": 1.0}, r"no key `gradient_cliping` \(did you mean `gradient_clipping`\?\)"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}, r"`zero_optimization\.reduce_bucket_sise` \(did"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, r"`data_types\.grad_acum_dtype` \(did you mean `grad_accum_dtype`"),
    ({"tensorboard": {"output_pth": "x"}}, r"`tensorboard\.output_pth` \(did you mean `output_path`"),
    ({"activation_checkpointing": {"partition_activation": True}}, r"did you mean `partition_activations`"),
    ({"bf16": {"enabled": False}}, r"`bf16\.enabled` is false, but the recipe owns it and says true"),
    ({"fp16": {"enabled": True}}, r"`fp16\.enabled` is true, but the recipe owns it and says false"),
    ({"gradient_clipping": 1.0}, r"`gradient_clipping` is 1\.0, but the recipe owns it and says 0\.5"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"`optimizer\.params\.lr`: the recipe owns"),
    ({"optimizer": {"type": "Lamb"}}, r"`optimizer`: the recipe owns the optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, r"`scheduler`: the recipe owns the learning-rate schedule"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, r"`zero_optimization\.reduce_bucket_size` is"),
    ({"zero_optimization": {"stage": "auto"}}, r"`zero_optimization\.stage` is 0, 1, 2 or 3; found \"auto\""),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, r"`zero_optimization\.overlap_comm`: "),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, r"nvme is not supported"),
    ({"gradient_allreduce_op": "sum"}, r"`gradient_allreduce_op` must be \"mean\""),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, r"`torch_autocast\.enabled` must be false"),
    ({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}, r"stage 0 accumulates in bf16"),
    ({"eigenvalue": {"enabled": True}}, r"DeepSpeed refuses it: .*removed"),
    ({"bf16": True}, r"`bf16` is an object of settings; found True"),
    ("[1]", r"a ds_config is an object; found list"),
    ('{\n"a": 1,\n}', r"mine\.json:\d: not valid JSON"),
    ('{"fp16": {}, "fp16": {}}', r"key `fp16` stands twice"),
]


@pytest.mark.parametrize(("tree", "message"), WRONG)
def test_a_wrong_file_is_refused_by_file_and_key(write: Callable[[Any], str], tree: Any, message: str) -> None:
    path = write(tree)
    with pytest.raises(ConfigError, match=message) as refusal:
        resolve(path, "bf16", stated={"gradient_clipping": [0.5]})
    assert path in str(refusal.value)


def test_a_hugging_face_file_with_auto_is_taken(write: Callable[[Any], str]) -> None:
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    path = write(
        {
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12},
            "optimizer": {"type": "AdamW", "params": params},
            "scheduler": "auto",
            "zero_optimization": {"stage": 2, "overlap_comm": True},
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "steps_per_print": 2000,
        }
    )
    found = resolve(path, "fp32")
    filled = ds_config.complete(found, {"train_batch_size": 8, "gradient_clipping": 0.0})
    assert "optimizer" not in filled
    assert "scheduler" not in filled
    assert filled["gradient_clipping"] == 0.0
    assert filled["steps_per_print"] == 2000
    assert filled["fp16"] == {"enabled": False, "loss_scale": 0, "initial_scale_power": 12}


def test_precision_auto_follows_the_ds_config_then_the_device(write: Callable[[Any], str]) -> None:
    assert precision_for("auto", "cpu") == "fp32"
    assert precision_for("bf16", "cpu") == "bf16"
    assert precision_for("auto", "cpu", "zero2") == "fp32"
    assert precision_for("auto", "cpu", "zero2_bf16") == "bf16"
    assert precision_for("auto", "cpu", str(ds_config.shipped_dir() / "zero2_bf16.json")) == "bf16"
    assert precision_for("auto", "cpu", write({"bf16": {"enabled": True}})) == "bf16"
    assert precision_for("fp32", "cpu", write({"bf16": {"enabled": True}})) == "fp32"
