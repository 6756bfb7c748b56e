"""The cases that the ranks of test_checkpoint.py run: `train` saves at one world size and ZeRO stage, `resume` loads at
any other.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.engine_cases import STAGES, assert_same, engine, main, network, train_step
from vae_ds import distributed
from vae_ds.config.settings import CheckpointConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.slices import MOMENTS, WEIGHTS, Part, PhaseState, Slice, shares
from vae_ds.errors import CheckpointError, StorageError
from vae_ds.training import checkpoint, shards
from vae_ds.training.saver import Saver

STEPS = 2
# The stage that a launch of so many ranks trains at. A global batch has 12 sentences.
STAGE_OF = {3: 1, 2: 2}
OTHER = 1.0  # the offset of the weights of an engine before it loads the checkpoint


def part_of(state: PhaseState, ranks: Ranks) -> Part:
    """The part of a whole state that a rank stores if every rank has all of it."""
    slices = {}
    frozen = frozenset(state.shapes.keys() - state.trained)
    for is_frozen in (True, False):
        sizes = {name: value.numel() for name, value in state.weights.items() if (name in frozen) == is_frozen}
        for name, (offset, length) in shares(sizes, ranks).items():
            whole = {WEIGHTS: state.weights[name]}
            whole |= {} if is_frozen else {kind: state.moments[kind][name] for kind in MOMENTS}
            slices[name] = Slice(
                offset, {kind: value.reshape(-1)[offset : offset + length].clone() for kind, value in whole.items()}
            )
    return Part(state.shapes, frozen, slices, state.steps, state.scaler)


def whole_of(state: shards.Stored) -> PhaseState:
    """A checkpoint's state in memory."""
    moments = {kind: {name: value.clone() for name, value in found.items()} for kind, found in state.moments.items()}
    weights = {name: value.clone() for name, value in state.weights.items()}
    return PhaseState(weights, moments, state.steps, state.scaler, state.generators)


def weights_at(path: Path) -> Mapping[str, torch.Tensor]:
    """All weights of one checkpoint, whole, by parameter name."""
    return checkpoint.load(checkpoint._open(path))[0].weights


def save(run_dir: Path, part: Callable[[], Part], progress: dict, ranks: Ranks) -> Path:
    """Write a checkpoint and wait for it. Delete no older one."""
    saver = Saver(run_dir, ranks, CheckpointConfig(keep=1_000_000))
    saver.begin(part, progress, must=True)
    saver.finish(must=True)
    return run_dir / "checkpoints" / f"step-{progress['global_step']:08d}"


def write_version_1(path: Path, state: PhaseState, manifest: dict[str, Any]) -> None:
    """Write a checkpoint as version 0.2 of vae_ds did: whole tensors, parameter i in shard i mod world."""
    path.mkdir(parents=True)
    entries = []
    for rank in range(manifest["world"]):
        names = list(state.weights)[rank :: manifest["world"]]
        tensors = {f"weights/{name}": state.weights[name] for name in names}
        for kind, moments in state.moments.items():
            tensors |= {f"{kind}/{name}": moments[name] for name in names if name in moments}
        file = path / f"shard-{rank:05d}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        entries.append({"file": file.name, "size": file.stat().st_size, "sha256": shards._sha256(file)})
    kept = {key: manifest[key] for key in ("world", "steps", "scaler", "progress", "generators")}
    told = {"schema_version": 1, "names": list(state.weights), **kept, "shards": entries}
    (path / checkpoint.MANIFEST).write_text(json.dumps(told))


def train(ranks: Ranks, folder: Path) -> None:
    """Train, let each rank save its slices, and record the next step of the uninterrupted run.

    The same state is also written as a checkpoint of schema version 1.
    """
    stage = STAGE_OF[ranks.world]
    trained = engine(network(stage), ranks, stage, "fp32")
    torch.manual_seed(ranks.rank)
    for step in range(STEPS):
        train_step(trained, ranks, step)
    progress = {"global_step": STEPS, "state": {"beta": 0.25, "held_kl": [0.5, 1.5], "name": "é"}, "data": {}}
    path = save(folder, trained.part, progress, ranks)
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.path == path
    cut = [
        name for name in found.layout.shapes if name not in found.layout.frozen and len(found.layout.pieces[name]) > 1
    ]
    assert cut, "no parameter crosses the border of two ranks, so this case tests less than it should"
    saved = trained.state()
    assert_same(saved, whole_of(checkpoint.load(found)[0]))
    drawn = torch.rand(3)
    rows = distributed.gather_rows(drawn[None])
    assert not torch.equal(rows[0], rows[1]), "the ranks draw the same numbers, so this case tests nothing"
    loss, outcome = train_step(trained, ranks, STEPS)
    state = trained.state()
    if ranks.is_main:
        told = {"loss": loss, "outcome": asdict(outcome), "drawn_RX": rows, "state": asdict(state), "stage": stage}
        old = folder / "version1"
        write_version_1(old / "checkpoints" / path.name, saved, found.manifest)
        for place in (folder, old):
            torch.save(told, place / "truth.pt")
    trained.close()
    distributed.barrier()


def resume(ranks: Ranks, folder: Path, stage: int, precision: str) -> None:
    """Load into an engine of any stage at any world size. The next step equals that of the uninterrupted run."""
    truth = torch.load(folder / "truth.pt")
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == STEPS
    state, progress = checkpoint.load(found, ranks)
    assert progress["state"] == {"beta": 0.25, "held_kl": [0.5, 1.5], "name": "é"}
    same_world = found.manifest["world"] == ranks.world
    assert (state.generators is not None) == same_world
    wrong = network(stage, {name: value + OTHER for name, value in state.weights.items()})
    resumed = engine(wrong, ranks, stage, precision)
    torch.rand(7)
    resumed.load(state)
    state.close()
    if same_world:
        assert torch.equal(torch.rand(3), truth["drawn_RX"][ranks.rank]), "the generators differ from the saved ones"
    assert_same(whole_of(state), resumed.state())
    loss, outcome = train_step(resumed, ranks, STEPS)
    assert outcome.applied
    after, expected = resumed.state(), PhaseState(**truth["state"])
    resumed.close()
    if precision != "fp32":
        assert abs(loss - truth["loss"]) < 0.05
        return
    exact = same_world and stage == truth["stage"]
    assert abs(loss - truth["loss"]) < 1e-5
    assert_same(expected, after, None if exact else 1e-5)


def broken_on_one_rank(ranks: Ranks, folder: Path) -> None:
    """A shard with a flipped bit, which one rank verifies: all ranks take the checkpoint before."""
    found = checkpoint.newest(folder)
    assert found is not None
    state = whole_of(checkpoint.load(found)[0])
    newer = save(folder, lambda: part_of(state, ranks), {"global_step": STEPS + 1, "data": {}}, ranks)
    shard = newer / f"shard-{ranks.world - 1:05d}.safetensors"
    if ranks.is_main:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    distributed.barrier()
    hashed: list[Path] = []
    hash_of = shards._sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_sha256", lambda path: hashed.append(path) or hash_of(path))
        resumed = checkpoint.resume(folder, ranks, {})
    assert resumed is not None
    assert resumed[1]["global_step"] == STEPS
    assert [path.name for path in hashed] == [f"shard-{ranks.rank:05d}.safetensors"] * 2, hashed
    distributed.barrier()
    if ranks.is_main:
        shutil.rmtree(newer)
    distributed.barrier()


def one_rank_fails(ranks: Ranks, folder: Path) -> None:
    """If one rank cannot write, the save fails on all ranks, and the last complete checkpoint stays the newest."""
    found = checkpoint.newest(folder)
    assert found is not None
    part = part_of(whole_of(checkpoint.load(found)[0]), ranks)
    if ranks.rank == 1:
        part.shapes.clear()
    with pytest.raises(StorageError, match="rank 1 could not write the checkpoint"):
        save(folder, lambda: part, {"global_step": 99}, ranks)
    again = checkpoint.newest(folder)
    assert again is not None
    assert again.path == found.path
    distributed.barrier()


def other_freezing(ranks: Ranks, folder: Path) -> None:
    """Loading a checkpoint into the engine of a phase with other frozen parameters is an error."""
    found = checkpoint.newest(folder)
    assert found is not None
    state, _ = checkpoint.load(found)
    trained = engine(network(1, freeze=None), ranks, 1, "fp32")
    with pytest.raises(CheckpointError, match=r"freezes other parameters: `middle\.bias` differs"):
        trained.load(state)
    trained.close()


def cases(folder: Path, world: int) -> dict:
    """All cases by name, of launches with 3, 2 and 1 ranks in this order. Each reads what the launches before wrote."""
    found = {}
    if world in STAGE_OF:
        found[f"train-world{world}"] = lambda ranks: train(ranks, folder / f"of{world}")
    kinds = {
        2: [*((2, stage, "fp32") for stage in STAGES), (2, 1, "bf16"), (2, 3, "bf16"), (3, 3, "fp32"), (3, 1, "fp32")],
        1: [(2, 0, "fp32"), (2, 3, "fp32"), (3, 0, "fp32")],
    }
    for saved_at, stage, precision in kinds.get(world, []):
        found[f"resume-of{saved_at}-zero{stage}-{precision}-world{world}"] = (
            lambda ranks, saved_at=saved_at, stage=stage, precision=precision: resume(
                ranks, folder / f"of{saved_at}", stage, precision
            )
        )
    if world == 2:
        for saved_at, stage in ((2, 2), (3, 3)):
            found[f"resume-version1-of{saved_at}-zero{stage}"] = lambda ranks, saved_at=saved_at, stage=stage: resume(
                ranks, folder / f"of{saved_at}" / "version1", stage, "fp32"
            )
        found["other_freezing"] = lambda ranks: other_freezing(ranks, folder / "of2")
        found["broken_on_one_rank"] = lambda ranks: broken_on_one_rank(ranks, folder / "of2")
        found["one_rank_fails"] = lambda ranks: one_rank_fails(ranks, folder / "of2")
    return found


if __name__ == "__main__":
    results = Path(sys.argv[1])
    results.mkdir(exist_ok=True)
    main(results, cases(Path(sys.argv[2]), int(sys.argv[3])))
