"""Engines at every ZeRO stage and precision on two real processes, and the checks of ds_configs."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support import engine_cases
from support.launch import Finished, clean_environment, launch
from vae_ds.config.settings import ModelConfig, OptimizerConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine import ds_config, groups, nvme
from vae_ds.engine.library import builds_async_io
from vae_ds.engine.phase_engine import PhaseEngine, resolve
from vae_ds.engine.precision import precision_for
from vae_ds.engine.slices import PhaseState
from vae_ds.errors import CheckpointError, ConfigError
from vae_ds.model import T5VAE

PROCESSES = 2
# Ten minutes of processor time, once an environment.
BUILD_S = 1800
# Half a minute on two free cores; on shared ones it took five.
pytestmark = pytest.mark.timeout(600 + BUILD_S)


class Session:
    """One launch of a session's cases: its answers by rank, its output, what it compiled, and its swap files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.extensions = folder / "extensions"
        self.swap = folder / "swap"
        self.swap.mkdir()
        env = {"TORCH_EXTENSIONS_DIR": str(self.extensions), nvme.VARIABLE: str(self.swap)}
        if name == "nvme":
            env |= async_io()
        self.finished: Finished = launch(
            [Path(engine_cases.__file__), folder, name], processes=PROCESSES, timeout_s=560, env=env, check=False
        )
        paths = [folder / f"rank{rank}.json" for rank in range(PROCESSES)]
        self.answers = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]


def async_io() -> dict[str, str]:
    """Where DeepSpeed's operator for NVMe is built, as a variable; builds it if it is not: minutes."""
    env = {"TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"]}
    code = "from vae_ds import engine; engine.builds_async_io(); import deepspeed.ops.op_builder as ops; "
    code += "ops.AsyncIOBuilder().load()"
    finished = launch(["-c", code], processes=1, timeout_s=BUILD_S, env=env, check=False)
    if finished.timed_out:
        # A killed build's, on which every later one would wait.
        for lock in Path(env["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
            lock.unlink()
    assert finished.codes == [0], finished.report()
    return env


@pytest.fixture(scope="module", params=engine_cases.SESSIONS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    if request.param == "nvme" and not builds_async_io():
        pytest.skip("offloading to NVMe needs libaio with its header (libaio-dev), g++ and ninja")
    return Session(tmp_path_factory.mktemp("engine"), request.param)


@pytest.mark.parametrize(
    ("session", "case"),
    [(name, case) for name in engine_cases.SESSIONS for case in engine_cases.cases(name)],
    indirect=["session"],
    scope="module",
)
def test_case_on_two_ranks(session: Session, case: str) -> None:
    for answers in session.answers:
        assert answers.get(case) == "ok", answers.get(case, f"not reached\n{session.finished.report()}")


def test_processes_end_well_quietly_compile_nothing_and_leave_no_swap_file(session: Session) -> None:
    assert session.finished.codes == [0] * PROCESSES, session.finished.report()
    assert not list(session.extensions.glob("**/*"))
    assert not list(session.swap.iterdir())
    chatter = [line for line in session.finished.output.splitlines() if line and not line.startswith("--- rank")]
    assert all("OVERFLOW" in line or "heavy write traffic" in line for line in chatter), chatter[:5]


def test_every_shipped_ds_config_that_a_cpu_can_start_was_started(session: Session) -> None:
    def belongs(name: str) -> bool:
        on_nvme = name.endswith("_nvme")
        return on_nvme and "fp16" not in name if session.name == "nvme" else session.name in name and not on_nvme

    expected = [name for name in ds_config.shipped_names() if belongs(name)]
    assert expected
    assert session.answers[0].get("started") == expected


def test_every_stage_on_one_rank(tmp_path: Path) -> None:
    finished = launch([Path(engine_cases.__file__), tmp_path, "alone"], processes=1, timeout_s=560, check=False)
    answers = json.loads((tmp_path / "rank0.json").read_text())
    for case in engine_cases.cases("alone"):
        assert answers.get(case) == "ok", answers.get(case, f"not reached\n{finished.report()}")


def test_what_of_a_t5_does_not_decay() -> None:
    model = T5VAE.from_base(ModelConfig(injection="self_attention+embedding"))
    kept = {name for name, parameter in model.named_parameters() if not groups.decays(name, parameter)}
    expected = {name for name, _ in model.named_parameters() if "layer_norm" in name or "attention_bias" in name}
    assert kept == expected
    assert sum("attention_bias" in name for name in kept) == 2
    assert sum("layer_norm" in name for name in kept) > 10


def test_importing_the_room_does_not_import_deepspeed(tmp_path: Path) -> None:
    code = "import vae_ds.engine, sys; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(tmp_path), timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("world", "section", "stage", "clip"),
    [
        (1, {"stage": 0}, 0, 0.0),
        (1, {"stage": 1}, 0, 0.0),
        (1, {"stage": 2}, 0, 0.0),
        (1, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2, 5.0),
        (1, {"stage": 3}, 3, 5.0),
        (2, {"stage": 0}, 0, 0.0),
        (2, {"stage": 1}, 1, 5.0),
    ],
)
def test_one_rank_in_float32_divides_nothing(world: int, section: dict[str, Any], stage: int, clip: float) -> None:
    filled = {"zero_optimization": dict(section), "gradient_clipping": 5.0}
    ds_config.settle_fp32(filled, world)
    assert filled == {"zero_optimization": section | {"stage": stage}, "gradient_clipping": clip}


def alone() -> Ranks:
    return Ranks(0, 0, 1, torch.device("cpu"))


def build(module: torch.nn.Module, precision: str = "fp32", **settings: Any) -> PhaseEngine:
    return PhaseEngine(
        module,
        optimizer=OptimizerConfig(),
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


@pytest.mark.parametrize(
    "weights", [{"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, {"weight": torch.zeros(2, 3)}]
)
def test_weights_of_another_model_are_refused(weights: dict[str, torch.Tensor]) -> None:
    """As many elements of another shape would be taken, and a missing parameter would keep what the module has."""
    with pytest.raises(CheckpointError, match=r"the weights of another model: `(weight|bias)` differs"):
        PhaseEngine(
            torch.nn.Linear(3, 2),
            optimizer=OptimizerConfig(),
            ranks=alone(),
            precision="fp32",
            ds_config=resolve("zero1", "fp32"),
            weights=PhaseState(weights, {}),
        )


def test_a_batch_size_of_the_file_that_is_not_the_recipes_is_named() -> None:
    with pytest.raises(ConfigError, match=r"`train_micro_batch_size_per_gpu` is 7, but the recipe divides the batches"):
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
    if name.endswith("_nvme") and not builds_async_io():
        with pytest.raises(ConfigError, match=r"cannot build its operator for NVMe here; install libaio"):
            resolve(name, precision, "cpu")
        return
    found = resolve(name, precision, "cpu")
    assert found["bf16"]["enabled"] is (precision == "bf16")
    assert found["fp16"]["enabled"] is (precision == "fp16")


def test_all_stages_and_precisions_are_shipped_but_the_broken_one() -> None:
    kinds = [f"zero{stage}_{{}}" for stage in range(4)] + [f"zero{stage}_{{}}_offload" for stage in (1, 2, 3)]
    kinds += ["zero3_{}_offload_params", "zero3_{}_nvme"]
    names = {kind.format(precision) for kind in kinds for precision in ds_config.PRECISIONS} - {"zero0_fp16"}
    assert names == set(ds_config.shipped_names())


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


def on_nvme(**zero: Any) -> dict[str, Any]:
    """A ds_config that offloads everything to NVMe, with these settings of `zero_optimization`."""
    sections = {name: {"device": "nvme"} for name in ("offload_optimizer", "offload_param")}
    return {"zero_optimization": {"stage": 3, **sections, **zero}}


WRONG = [
    ({"gradient_cliping": 1.0}, r"no key `gradient_cliping` \(did you mean `gradient_clipping`\?\)"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}, r"`zero_optimization\.reduce_bucket_sise` \(did"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, r"`data_types\.grad_acum_dtype` \(did you mean `grad_accum_dtype`"),
    ({"tensorboard": {"output_pth": "x"}}, r"`tensorboard\.output_pth` \(did you mean `output_path`"),
    ({"activation_checkpointing": {"partition_activation": True}}, r"did you mean `partition_activations`"),
    ({"bf16": {"enabled": False}}, r"`bf16\.enabled` is false, but the recipe sets it to true"),
    ({"fp16": {"enabled": True}}, r"`fp16\.enabled` is true, but the recipe sets it to false"),
    ({"gradient_clipping": 1.0}, r"`gradient_clipping` is 1\.0, but the recipe sets it to 0\.5"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"`optimizer\.params\.lr`: the recipe sets"),
    ({"optimizer": {"type": "Lamb"}}, r"`optimizer`: the recipe sets the optimizer"),
    ({"scheduler": {"type": "WarmupLR"}}, r"`scheduler`: the recipe sets the learning-rate schedule"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, r"`zero_optimization\.reduce_bucket_size` is"),
    ({"zero_optimization": {"stage": "auto"}}, r"`zero_optimization\.stage` must be 0, 1, 2 or 3; found \"auto\""),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}, r"`zero_optimization\.overlap_comm`: "),
    (on_nvme(stage=2), r"`zero_optimization\.offload_optimizer\.device`: nvme needs stage 3; found stage 2"),
    (on_nvme(sub_group_size=1e9), r"`zero_optimization\.sub_group_size` must be 1 with nvme .*found 1000000000"),
    (on_nvme(offload_optimizer={"device": "nvme", "fast_init": True}), r"fast_init` must be false with nvme"),
    (on_nvme(stage3_prefetch_bucket_size=5e7), r"`zero_optimization\.stage3_prefetch_bucket_size` must be 0 with nvme"),
    (on_nvme(stage3_max_reuse_distance=1e9), r"`zero_optimization\.stage3_max_reuse_distance` must be 0 with nvme"),
    (on_nvme(offload_param={"device": "nvme", "max_in_cpu": 1e9}), r"offload_param\.max_in_cpu` must be 0 with nvme"),
    (
        on_nvme(offload_param={"device": "nvme", "nvme_path": "/no/such"}),
        r"`zero_optimization\.offload_param\.nvme_path`: /no/such: no such directory; write \"auto\" there, and set "
        r"VAE_DS_NVME to a folder",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r"`zero_optimization\.offload_optimizer\.ratio` must be 1\.0",
    ),
    ({"aio": {"use_gds": True}}, r"`aio\.use_gds` must be false"),
    ({"gradient_allreduce_op": "sum"}, r"`gradient_allreduce_op` must be \"mean\""),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, r"`torch_autocast\.enabled` must be false"),
    ({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}, r"stage 0 accumulates in bf16"),
    ({"eigenvalue": {"enabled": True}}, r"DeepSpeed refuses it: .*removed"),
    ({"bf16": True}, r"`bf16` must be an object of settings; found True"),
    ("[1]", r"a ds_config must be an object; found list"),
    ('{\n"a": 1,\n}', r"mine\.json:\d: not valid JSON"),
    ('{"fp16": {}, "fp16": {}}', r"duplicate key `fp16`"),
]


@pytest.mark.parametrize(("tree", "message"), WRONG)
def test_a_wrong_file_is_refused_by_file_and_key(write: Callable[[Any], str], tree: Any, message: str) -> None:
    path = write(tree)
    with pytest.raises(ConfigError, match=message) as refusal:
        resolve(path, "bf16", stated={"gradient_clipping": [0.5]})
    assert path in str(refusal.value)


@pytest.mark.parametrize(("path", "fault"), [("/no/such", "no such directory"), ("/proc", "not writable")])
@pytest.mark.parametrize("variable", [nvme.VARIABLE, "TMPDIR"])
def test_a_path_of_the_environment_that_cannot_hold_swap_files_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, path: str, fault: str
) -> None:
    monkeypatch.delenv(nvme.VARIABLE, raising=False)
    monkeypatch.setenv(variable, path)
    with pytest.raises(ConfigError, match=rf"^\${variable}: {path}: {fault}.*; set VAE_DS_NVME to a folder"):
        nvme.settle(on_nvme(), "mine.json")


def test_a_file_is_no_folder_for_swap_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(nvme.VARIABLE, str(file))
    with pytest.raises(ConfigError, match=rf"^\${nvme.VARIABLE}: {file}: not a directory"):
        nvme.settle(on_nvme(), "mine.json")


def settled(monkeypatch: pytest.MonkeyPatch, path: Path, **zero: Any) -> dict[str, Any]:
    monkeypatch.setenv(nvme.VARIABLE, str(path))
    tree = on_nvme(**zero)
    nvme.settle(tree, "mine.json")
    return tree


def test_the_environment_names_the_path_and_a_file_may_state_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, other = tmp_path / "own {}", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    tree = settled(monkeypatch, other, offload_param={"device": "nvme", "nvme_path": str(own), "max_in_cpu": "auto"})
    assert {name: one["nvme_path"] for name, one in nvme.sections(tree).items()} == {
        "offload_optimizer": str(other),
        "offload_param": str(own),
    }
    assert tree["zero_optimization"]["sub_group_size"] == 1
    assert tree["zero_optimization"]["offload_param"]["max_in_cpu"] == 0
    assert not [*own.iterdir(), *other.iterdir()], "the trial leaves nothing"


def test_a_parameter_sizes_the_buffers_and_a_smaller_statement_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, parameters = "zero_optimization.offload_param.buffer_size", list(torch.nn.Linear(5, 3).parameters())
    assert nvme.owned(settled(monkeypatch, tmp_path), parameters, world=2) == {key: 8}
    stated = {"device": "nvme", "buffer_size": 10}
    tree = settled(monkeypatch, tmp_path, offload_param=stated)
    assert nvme.owned(tree, parameters, world=2) == {key: 10}
    with pytest.raises(ConfigError, match=r"buffer_size`: found 10, but a parameter has 15 elements per rank"):
        nvme.owned(tree, parameters, world=1)


def test_a_drive_without_room_is_an_error_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = settled(monkeypatch, tmp_path)
    tree["zero_optimization"]["offload_param"]["buffer_size"] = 1
    huge = torch.nn.Parameter(torch.empty(10**15, device="meta"))
    with pytest.raises(
        ConfigError, match=r"GB free, but the ranks of this node need 18000000\.00 GB there; set VAE_DS_NVME"
    ):
        nvme.claim(tree, [huge], alone(), element_bytes=2)
    assert not list(tmp_path.iterdir())


def test_memory_that_may_not_be_locked_is_an_error_of_one_line(tmp_path: Path) -> None:
    code = f"""
import os, torch
from vae_ds import distributed
from vae_ds.engine import nvme
tree = {on_nvme()}
nvme.settle(tree, "mine.json")
tree["zero_optimization"]["offload_param"]["buffer_size"] = 1
ranks = distributed.Ranks(0, 0, 1, torch.device("cpu"))
nvme.claim(tree, [torch.nn.Parameter(torch.empty(10**6))], ranks, element_bytes=2)
"""
    # Root may lock any memory, unless that right is taken away.
    without = ["setpriv", "--bounding-set=-ipc_lock"] if os.geteuid() == 0 else []
    if without and shutil.which("setpriv") is None:
        pytest.skip("root's right to lock memory cannot be taken away without setpriv")
    limited = [*without, "bash", "-c", 'ulimit -l 64; exec "$@"', "bash", sys.executable, "-c", code]
    env = clean_environment(tmp_path) | {nvme.VARIABLE: str(tmp_path)}
    done = subprocess.run(limited, env=env, timeout=60, check=False, capture_output=True, text=True)
    wanted = "locks 18.0 MB of memory per rank, but only 0.1 MB may be locked; raise the limit (`ulimit -l unlimited`"
    assert wanted in done.stderr, done.stderr
    assert not list(tmp_path.glob(f"{nvme.PREFIX}*"))


def test_swap_files_of_a_killed_rank_are_removed_and_those_in_use_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = f"""
import sys
from vae_ds.engine import nvme
tree = {on_nvme()}
nvme.settle(tree, "mine.json")
folders = nvme.SwapFolders(tree)
print("ready", flush=True)
sys.stdin.read()
"""
    env = clean_environment(tmp_path) | {nvme.VARIABLE: str(tmp_path)}
    tree = settled(monkeypatch, tmp_path)
    tree["zero_optimization"]["offload_param"]["buffer_size"] = 1
    parameter = torch.nn.Parameter(torch.empty(1))

    def others() -> list[Path]:
        """The folders after another run has come and gone."""
        nvme.claim(copy.deepcopy(tree), [parameter], alone(), element_bytes=4).close()
        return list(tmp_path.glob(f"{nvme.PREFIX}*"))

    with subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"ready\n"
        (folder,) = tmp_path.glob(f"{nvme.PREFIX}*")
        (folder / "big.swp").write_bytes(b"x")
        long_ago = time.time() - 2 * nvme.YOUNG_S
        os.utime(folder, (long_ago, long_ago))
        assert others() == [folder], "in use"
        rank.kill()
        rank.wait()
    os.utime(folder)
    assert others() == [folder], "too young to be sure"
    os.utime(folder, (long_ago, long_ago))
    assert others() == []


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


@pytest.mark.parametrize(("major", "expected"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_precision_auto_does_not_take_emulated_bf16(
    major: int, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own rule, on the properties of a V100 or T4 (7), an A100 (8) and an H100 (9). All accept bf16 tensors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert torch.cuda.is_bf16_supported()
    assert precision_for("auto", "cuda:0") == expected
    assert not caplog.messages
    assert precision_for("auto", "cuda:0", tell=True) == expected
    assert len(caplog.messages) == (expected == "fp32")
    assert all("precision=fp16" in message for message in caplog.messages)
    assert precision_for("auto", "cuda:0", "zero2_fp16", tell=True) == "fp16"
    assert precision_for("bf16", "cuda:0", tell=True) == "bf16"


def test_deepspeed_comes_without_mlflow() -> None:
    """Which DeepSpeed would import for its autotuner alone, in seconds; afterwards it can be imported as before."""
    code = "import sys; from vae_ds.engine.library import deepspeed_library; deepspeed_library(); "
    code += "assert not [name for name in sys.modules if name.partition('.')[0] == 'mlflow']; import mlflow"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
