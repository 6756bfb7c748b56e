"""Runs with adapters: at each ZeRO stage the same losses, the base's own weights never move, the export is merged."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoint_cases import write_version_1
from support.launch import job, run_jobs
from support.models import build
from support.processes import curve
from support.recipes import write_recipe
from support.tiny import ENGLISH, NORMAL_PRIOR, demo_settings, make_base, write_splits
from vae_ds import config as configuration
from vae_ds.config import RunConfig
from vae_ds.engine import PhaseState
from vae_ds.errors import CheckpointError, ConfigError, StorageError
from vae_ds.evaluation import finished_run
from vae_ds.latents import reconstruct, sample
from vae_ds.model import T5VAE, held_names, is_adapter
from vae_ds.runtime import records
from vae_ds.training import checkpoint, dry_run, phases, trainer
from vae_ds.training.preparation import check_model

STEPS = 8  # of each of the two phases
ADAPTERS = "{rank: 4, alpha: 16, modules: [q, v, o, wo]}"
# What must not change the losses: processes, and the settings of a run.
SAME = {
    **{f"stage{stage}": (2, f"deepspeed=zero{stage}") for stage in range(4)},
    "checkpointing": (2, "model.gradient_checkpointing=true"),
    "one": (1, "deepspeed=zero0"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases: a warm-up with a frozen decoder, whose adapters are frozen with it, then nothing is frozen."""
    folder = tmp_path_factory.mktemp("lora")
    make_base(folder / "tied", "t5", num_layers=1, num_decoder_layers=2)
    make_base(folder / "untied", "v1_1", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    return write_recipe(
        folder,
        f"""
name: adapted
model: {{base: {folder / "tied"}, latent_dim: 8, dropout: 0, lora: {ADAPTERS}}}
data: {{corpus: text, path: {text}, max_tokens: 24, cache_dir: {folder / "cache"}}}
batch: {{global: 32}}
precision: fp32
phases:
  - name: warmup
    steps: {STEPS}
    freeze: [decoder]
    beta: {{schedule: constant, value: 0}}
    optimizer: {{lr: 1.0e-2, clip: 50}}
  - name: full
    steps: {STEPS}
    optimizer: {{lr: 1.0e-2, clip: 50, weight_decay: 0.1}}
validation: {{every_steps: 1000, sentences: 16}}
checkpoint: {{every_steps: 1000}}
""",
    )


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[int, list] = {1: [], 2: []}
    for name, (world, setting) in SAME.items():
        jobs[world].append(job(recipe, folder / name, setting))
    untied = (f"model.base={recipe.parent / 'untied'}", "model.injection=self_attention")
    jobs[2].append(job(recipe, folder / "untied-stage3", *untied, "deepspeed=zero3"))
    jobs[1].append(job(recipe, folder / "untied-one", *untied, "deepspeed=zero0"))
    for stage in (1, 3):
        jobs[2].append(job(recipe, folder / f"bf16-stage{stage}", f"deepspeed=zero{stage}", "precision=bf16"))
    dropout = ("model.dropout=0.1", "model.lora.dropout=0.1", "deepspeed=zero2")
    jobs[2].append(job(recipe, folder / "whole", *dropout))
    jobs[2].append(job(recipe, folder / "stopped", *dropout, stop_at=STEPS + 3))
    jobs[2].append(job(recipe, folder / "stopped", *dropout))
    for world, listed in jobs.items():
        run_jobs(world, listed, folder, timeout_s=800)
    return folder


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def adapters(run: Path) -> dict[str, torch.Tensor]:
    """The exported adapters, by the names of the model's parameters."""
    stored = load_file(run / "model" / "adapters" / "adapter_model.safetensors")
    names = {name: re.sub(r"(lora_.)", r"\1.default", name.replace("base_model.model.", "t5.")) for name in stored}
    return {name.replace(".EncDecAttention.o.", ".o."): stored[key] for key, name in names.items()}


def start_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run starts from."""
    config = configuration.load(RunConfig, str(run / "config.yaml"))
    return {name: tensor.detach() for name, tensor in T5VAE.from_base(config.model, config.seed).named_parameters()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SAME)
def test_every_engine_has_the_same_losses(runs: Path, name: str) -> None:
    found, wanted = curve(runs / name), curve(runs / "one")
    assert [row["step"] for row in found] == list(range(1, 2 * STEPS + 1))
    for row, other in zip(found, wanted, strict=True):
        for key in ("loss", "rec", "kl", "grad_norm"):
            # A norm of small gradients has fewer digits than the losses.
            within = 1e-3 if key == "grad_norm" else 1e-4
            assert row[key] == pytest.approx(other[key], rel=within), (name, row, other)
    assert found[STEPS - 1]["rec"] < 0.97 * found[0]["rec"]


def test_an_untied_base_with_z_in_the_self_attention(runs: Path) -> None:
    for row, other in zip(curve(runs / "untied-stage3"), curve(runs / "untied-one"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert len(curve(runs / "untied-stage3")) == 2 * STEPS


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_trains_float32_adapters(runs: Path, stage: int) -> None:
    """A step of 1e-2 on an adapter that starts at 0 is exact only in float32; the losses differ by rounding alone."""
    for row, other in zip(curve(runs / f"bf16-stage{stage}"), curve(runs / "one"), strict=True):
        assert row["rec"] == pytest.approx(other["rec"], rel=2e-2)
    for name, tensor in adapters(runs / f"bf16-stage{stage}").items():
        assert not torch.equal(tensor, tensor.bfloat16().float()), name


@pytest.mark.parametrize("name", [*SAME, "untied-stage3", "bf16-stage3", "stopped"])
def test_the_own_weights_of_the_base_never_move(runs: Path, name: str) -> None:
    """Whatever is no adapter and no new weight is the base's, bit by bit; an adapted matrix differs by its adapter."""
    start, ends, trained = start_of(runs / name), exported(runs / name), adapters(runs / name)
    assert set(trained) == {key for key in start if is_adapter(key)}
    for key, before in start.items():
        if is_adapter(key):
            assert not torch.equal(trained[key], before), f"{key} did not move"
            continue
        layer = key.removesuffix(".base_layer.weight")
        after = ends[f"{layer}.weight" if layer != key else key]
        if layer != key:
            a_RI, b_OR = (trained[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            torch.testing.assert_close(after, before + 4 * b_OR @ a_RI, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(after, before) != phases.is_new(key), key


@pytest.fixture(scope="module")
def warm(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the warm-up alone, and one more that starts from its model."""
    folder = tmp_path_factory.mktemp("warm")
    text = recipe.read_text(encoding="utf-8")
    path = folder / "warm.yaml"
    path.write_text(text.replace(text[text.index("  - name: full") : text.index("validation:")], ""), encoding="utf-8")
    first, then = folder / "first", folder / "then"
    run_jobs(2, [job(path, first), job(path, then, f"model.weights={first}", "deepspeed=zero2")], folder)
    return folder


@pytest.mark.timeout(900)
def test_a_phase_that_freezes_a_stack_freezes_its_adapters(warm: Path) -> None:
    """After the warm-up alone, the decoder's adapters are as they began; those of the encoder have moved."""
    start, trained = start_of(warm / "first"), adapters(warm / "first")
    assert trained
    for name, tensor in trained.items():
        assert torch.equal(tensor, start[name]) == name.startswith("t5.decoder."), name


@pytest.mark.timeout(900)
def test_adapters_on_a_trained_vae(warm: Path) -> None:
    """The merged matrices of the first run are those that the second leaves as they are."""
    start, ends, trained = exported(warm / "first"), exported(warm / "then"), adapters(warm / "then")
    adapted = {name.partition(".lora_")[0] for name in trained if name.startswith("t5.encoder.")}
    assert adapted
    for name, before in start.items():
        layer = name.removesuffix(".weight")
        if layer in adapted:
            a_RI, b_OR = (trained[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            torch.testing.assert_close(ends[name], before + 4 * b_OR @ a_RI, atol=1e-6, rtol=1e-6)
            assert not torch.equal(ends[name], before), name
        else:
            assert torch.equal(ends[name], before) != phases.is_new(name), name


def test_a_resumed_run_is_the_run_never_stopped(runs: Path) -> None:
    assert curve(runs / "stopped") == curve(runs / "whole")
    ours, theirs = exported(runs / "stopped"), exported(runs / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def newest(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(run)
    assert found is not None
    return found


@pytest.mark.parametrize("name", [*SAME, "untied-stage3", "bf16-stage1", "bf16-stage3", "stopped"])
def test_a_checkpoint_leaves_out_what_never_trains(runs: Path, name: str) -> None:
    """12 bytes for each trained parameter of the second phase, which trains all adapters, and headers."""
    found, start = newest(runs / name), start_of(runs / name)
    held = held_names(start)
    assert set(found.layout.left_out) == held == set(found.layout.frozen)
    trained = sum(tensor.numel() for key, tensor in start.items() if key not in held)
    size = sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    assert 12 * trained <= size < 12 * trained + 400 * len(start)
    assert 4 * sum(start[key].numel() for key in held) > 400 * len(start), "the base is so small that all would pass"
    stored, _ = checkpoint.load(found)
    assert set(stored.weights) == set(start) - held
    for key in held:
        told = hashlib.sha256(start[key].numpy().tobytes()).hexdigest()
        assert stored.left_out[key] == told, key


KEYS = "decoder.block.0.layer.0.SelfAttention.k.weight"


def moved(run: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a run, with a copy of its base: the two directories."""
    text = (run / "config.yaml").read_text(encoding="utf-8")
    before = re.search(r"^  base: (.+)$", text, re.M)
    assert before is not None
    shutil.copytree(run, folder / "run")
    own = Path(shutil.copytree(before[1], folder / "own"))
    (folder / "run" / "config.yaml").write_text(text.replace(before[0], f"  base: {own}"), encoding="utf-8")
    return folder / "run", own


def change(own: Path, name: str) -> None:
    """Change one number of a weight of a base or of an export a little; the second time, it is as before."""
    tensors = load_file(own / "model.safetensors")
    tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})


def go_on(run: Path) -> None:
    """Two more steps of the last phase."""
    trainer.train(str(run / "config.yaml"), run, [f"phases.1.steps={STEPS + 2}"])


def test_a_base_that_has_changed_is_refused_by_name(runs: Path, tmp_path: Path) -> None:
    """The checkpoint does not have its weights: the adapters would go on with other ones."""
    run, own = moved(runs / "one", tmp_path)
    change(own, KEYS)
    with pytest.raises(CheckpointError) as told:
        go_on(run)
    assert str(told.value) == (
        f"model.base {own}: its weights have changed since {run}/checkpoints/step-{2 * STEPS:08d} was written, which "
        f"does not have them (`t5.{KEYS}` differs); put the earlier weights back there, or choose another --run-dir"
    )
    change(own, KEYS)
    go_on(run)
    assert len(curve(run)) == 2 * STEPS + 2


def test_a_base_that_changes_before_the_export_is_refused(runs: Path, tmp_path: Path) -> None:
    """A run whose last phase is complete, and that has no model/ yet, exports what its checkpoint and the base have."""
    run, own = moved(runs / "one", tmp_path)
    before = exported(run)
    status = records.read_status(run) or {}

    def export() -> None:
        shutil.rmtree(run / "model", ignore_errors=True)
        records.write_status(run, "stopped", **{key: status[key] for key in ("step", "total_steps")})
        trainer.train(str(run / "config.yaml"), run)

    export()
    after = exported(run)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    change(own, "shared.weight")
    with pytest.raises(StorageError, match=r"model\.base .*: its weights have changed .*`t5\.shared\.weight` differs"):
        export()
    assert not (run / "model").exists()


def test_a_run_goes_on_from_a_checkpoint_that_has_all_weights(runs: Path, tmp_path: Path) -> None:
    """Checkpoints of earlier versions do. Their weights count, also if the base has changed, and new ones have them."""
    run, _ = moved(runs / "one", tmp_path)
    go_on(run)
    old, own = moved(runs / "one", tmp_path / "old")
    stored, _ = checkpoint.load(newest(old))
    start = start_of(old)
    state = PhaseState(
        {name: stored.weights[name].clone() if name in stored.weights else start[name] for name in stored.shapes},
        {kind: {name: value.clone() for name, value in found.items()} for kind, found in stored.moments.items()},
        stored.steps,
    )
    path, manifest = newest(old).path, newest(old).manifest
    shutil.rmtree(path)
    write_version_1(path, state, manifest)
    change(own, KEYS)
    go_on(old)
    assert curve(old) == curve(run)
    found = newest(old)
    assert not found.layout.left_out
    after, wanted = checkpoint.load(found)[0].weights, checkpoint.load(newest(run))[0].weights
    assert all(torch.equal(after[name], wanted[name] if name in wanted else start[name]) for name in after)
    ours, theirs = exported(old), exported(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_from_a_trained_vae_has_the_weights_of_that(warm: Path, tmp_path: Path) -> None:
    """Not those of the base, from which its embeddings differ."""
    text = (warm / "first" / "config.yaml").read_text(encoding="utf-8")
    trained = tmp_path / "trained"
    shutil.copytree(warm / "first" / "model", trained)
    change(trained, "t5.shared.weight")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("  weights: null", f"  weights: {trained}"), encoding="utf-8")
    for name, ends in (("whole", [STEPS]), ("resumed", [3, STEPS])):
        for steps in ends:
            trainer.train(str(recipe), tmp_path / name, [f"phases.0.steps={steps}"])
    assert curve(tmp_path / "whole") == curve(tmp_path / "resumed")
    ours, theirs = exported(tmp_path / "resumed"), exported(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(ours["t5.shared.weight"], load_file(trained / "model.safetensors")["t5.shared.weight"])
    assert newest(tmp_path / "resumed").layout.left_out
    change(trained, "t5.shared.weight")
    with pytest.raises(CheckpointError, match=rf"^model\.weights {trained}: its weights have changed since "):
        trainer.train(str(recipe), tmp_path / "resumed", [f"phases.0.steps={STEPS + 1}"])


def test_a_run_does_not_resume_with_other_adapters(runs: Path, recipe: Path) -> None:
    for change, told in (
        ("model.lora.rank=8", r"model\.lora\.rank was 4, now 8"),
        ("model.lora.modules=[q]", r"model\.lora\.modules was \['q', 'v', 'o', 'wo'\], now \['q'\]"),
        ("model.lora=null", r"model\.lora\.rank was 4, now None"),
    ):
        with pytest.raises(ConfigError, match=r"the run was trained with other settings: .*" + told):
            dry_run(str(recipe), runs / "one", ["deepspeed=zero0", change])


def test_the_model_of_a_run_is_used_as_any_other(runs: Path) -> None:
    model, tokenizer = finished_run.load_model(runs / "one")
    assert len(reconstruct(model, tokenizer, ENGLISH[:3], max_new_tokens=8)) == 3
    assert len(sample(model, tokenizer, 2, max_new_tokens=8)) == 2
    found = finished_run.evaluate_run(runs / "one", "test", {"iw_samples": 2, "mi_train_sentences": 16, "samples": 8})
    assert found is not None
    assert found["nelbo"] > 0


@pytest.mark.timeout(360)
def test_the_facts_of_a_dry_run(tmp_path: Path) -> None:
    settings = [*demo_settings(tmp_path), *NORMAL_PRIOR, "phases.0.steps=2", "phases.1.steps=3", "model.lora.rank=2"]
    facts = [line for line in dry_run("demo", tmp_path / "run", settings).splitlines() if line.startswith("# ")]
    # q and v are 32 x 48, so an adapter has 2 x (32 + 48) parameters. The base has 2 and 3 blocks.
    assert (
        "# adapters: encoder 640 in 4 layers, decoder 960 in 6 layers; the other weights of these stacks and the "
        "embeddings stay"
    ) in facts
    # W_mu and W_logvar are 32 x 4 each. W_proj is 3 x 4 x 48. The warm-up of the demo freezes the decoder.
    new = 2 * 32 * 4 + 3 * 4 * 48
    assert [fact.split("trains ")[1] for fact in facts if "trains" in fact] == [
        f"{count:,} parameters" for count in (new + 640, new + 640 + 960)
    ]


def test_the_start_says_how_many_parameters_train() -> None:
    model = build(lora={"rank": 2})
    phases.freeze(model, ["decoder"])
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = 2 * 32 * 5 + 3 * 5 * 48 + 4 * 2 * (32 + 48)
    assert phases.sizes(model) == f"trains {trained:,} of {every:,} parameters"


def test_adapters_that_no_phase_trains_are_an_error(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    warmup = [f"model.base={base}", "model.latent_dim=4", "phases.0.freeze=[decoder]", "model.lora.where=decoder"]
    check_model(configuration.load(RunConfig, "demo", warmup))
    for freeze in ("[decoder]", "[t5.decoder.*]"):
        frozen = [*warmup, f"phases.1.freeze={freeze}"]
        with pytest.raises(ConfigError, match=r"^model\.lora: every phase freezes all adapters, so they would stay 0"):
            check_model(configuration.load(RunConfig, "demo", frozen))
        check_model(configuration.load(RunConfig, "demo", [*frozen, "model.lora.where=both"]))
    with pytest.raises(ConfigError, match=r"^--set model\.lora\.rank=0: .*greater than or equal to 1; found 0$"):
        configuration.load(RunConfig, "demo", ["model.lora.rank=0"])


def test_dropout_is_active_in_a_block_that_its_adapters_train() -> None:
    """Its feed-forward layer has no trainable weight. A frozen block inside an adapted stack runs without dropout."""
    model = build(lora={"rank": 2, "dropout": 0.5})
    phases.freeze(model, ["decoder", "t5.encoder.block.0.*"])
    phases.train_mode(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert all(mode for name, mode in modes.items() if name.startswith("t5.encoder.block.1"))
    assert modes["t5.encoder.dropout"]
    assert not any(mode for name, mode in modes.items() if name.startswith("t5.encoder.block.0"))
    within = {name for name, mode in modes.items() if mode and name.startswith("t5.decoder")}
    assert within == {name for name in modes if name.startswith("t5.decoder") and name.endswith("memory")}
    phases.freeze(model, [])
    phases.train_mode(model)
    assert all(
        module.training
        for name, module in model.named_modules()
        if name.startswith(("t5.enc", "t5.dec")) and not name.endswith("embed_tokens")
    )
