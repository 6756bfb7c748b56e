"""The cases that the ranks of test_checkpoint.py run: `train` saves on two ranks, `resume` loads at any world size and
ZeRO stage.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from support.engine_cases import STAGES, assert_same, engine, main, network, train_step
from vae_ds import distributed
from vae_ds.config.settings import CheckpointConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.phase_engine import PhaseState
from vae_ds.errors import CheckpointError, StorageError
from vae_ds.training import checkpoint
from vae_ds.training.saver import Saver

STAGE, STEPS, ACCUMULATION = 2, 2, 2
OTHER = 1.0  # the offset of the weights of an engine before it loads the checkpoint


def save(run_dir: Path, state: PhaseState, progress: dict, ranks: Ranks) -> Path:
    """Write a checkpoint and wait for it. Delete no older one."""
    saver = Saver(run_dir, ranks, CheckpointConfig(keep=1_000_000))
    saver.begin(lambda: state, progress, must=True)
    saver.finish(must=True)
    return run_dir / "checkpoints" / f"step-{progress['global_step']:08d}"


def train(ranks: Ranks, folder: Path) -> None:
    """Train, let each rank save its share, and record the next step of the uninterrupted run."""
    trained = engine(network(STAGE), ranks, STAGE, "fp32")
    torch.manual_seed(ranks.rank)
    for step in range(STEPS):
        train_step(trained, ranks, step)
    saved = trained.state(share=True)
    assert len(saved.weights) < len(saved.names)
    progress = {"global_step": STEPS, "state": {"beta": 0.25, "held_kl": [0.5, 1.5], "name": "é"}}
    path = save(folder, saved, progress, ranks)
    assert (path / checkpoint.MANIFEST).is_file()
    drawn = torch.rand(3)
    rows = distributed.gather_rows(drawn[None])
    assert not torch.equal(rows[0], rows[1]), "the ranks draw the same numbers, so this case tests nothing"
    loss, outcome = train_step(trained, ranks, STEPS)
    state = trained.state()
    if ranks.is_main:
        torch.save(
            {"loss": loss, "outcome": asdict(outcome), "drawn_RX": rows, "state": asdict(state)}, folder / "truth.pt"
        )
    trained.close()
    distributed.barrier()


def resume(ranks: Ranks, folder: Path, stage: int, precision: str) -> None:
    """Load into an engine of any stage at any world size. The next step equals that of the uninterrupted run."""
    truth = torch.load(folder / "truth.pt")
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.step == STEPS
    state, progress = checkpoint.load(found, ranks)
    assert progress == {"global_step": STEPS, "state": {"beta": 0.25, "held_kl": [0.5, 1.5], "name": "é"}}
    same_world = found.manifest["world"] == ranks.world
    assert (state.generators is not None) == same_world
    accumulation = ACCUMULATION * found.manifest["world"] // ranks.world
    wrong = network(STAGE, {name: value + OTHER for name, value in state.weights.items()})
    resumed = engine(wrong, ranks, stage, precision, accumulation=accumulation)
    torch.rand(7)
    resumed.load(state)
    if same_world:
        assert torch.equal(torch.rand(3), truth["drawn_RX"][ranks.rank]), "the generators differ from the saved ones"
    assert_same(state, resumed.state())
    loss, outcome = train_step(resumed, ranks, STEPS, accumulation)
    assert outcome.applied
    after, expected = resumed.state(), PhaseState(**truth["state"])
    resumed.close()
    if precision != "fp32":
        assert abs(loss - truth["loss"]) < 0.05
        return
    exact = same_world and stage == STAGE
    assert abs(loss - truth["loss"]) < 1e-5
    assert_same(expected, after, None if exact else 1e-5)


def one_rank_fails(ranks: Ranks, folder: Path) -> None:
    """If one rank cannot write, the save fails on all ranks, and the last complete checkpoint stays the newest."""
    found = checkpoint.newest(folder)
    assert found is not None
    state, _ = checkpoint.load(found)
    if ranks.rank == 1:
        state.weights.clear()
    with pytest.raises(StorageError, match="rank 1 could not write the checkpoint"):
        save(folder, state, {"global_step": 99}, ranks)
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
    """All cases by name. The cases of one rank need the files of an earlier launch with two ranks."""
    found = {}
    if world == 2:
        found["train"] = lambda ranks: train(ranks, folder)
    kinds = (
        [(stage, "fp32") for stage in STAGES] + [(1, "bf16"), (3, "bf16")] if world == 2 else [(0, "fp32"), (3, "fp32")]
    )
    for stage, precision in kinds:
        found[f"resume-zero{stage}-{precision}-world{world}"] = lambda ranks, stage=stage, precision=precision: resume(
            ranks, folder, stage, precision
        )
    if world == 2:
        found["other_freezing"] = lambda ranks: other_freezing(ranks, folder)
        found["one_rank_fails"] = lambda ranks: one_rank_fails(ranks, folder)
    return found


if __name__ == "__main__":
    results = Path(sys.argv[1])
    results.mkdir(exist_ok=True)
    main(results, cases(Path(sys.argv[2]), int(sys.argv[3])))
