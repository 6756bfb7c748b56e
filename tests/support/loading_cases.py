"""The cases that each rank of test_loading.py runs: how a phase gets its first weights, and the memory that this takes.

`loading_cases.py RESULTS BASES`; BASES has the random bases of `make_bases`.
"""

import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from support.engine_cases import main
from support.tiny import make_base
from vae_ds import config as configuration
from vae_ds import distributed
from vae_ds.bench.memory_rank import anonymous_bytes
from vae_ds.config import RunConfig
from vae_ds.distributed import Ranks
from vae_ds.engine import MOMENTS, PhaseEngine, resolve
from vae_ds.model import T5VAE
from vae_ds.training import phases, shards
from vae_ds.training.build import build_engine, build_model
from vae_ds.training.preparation import Setup
from vae_ds.training.shards import Stored

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = [(f"zero{stage}", precision) for stage in range(4) for precision in PRECISIONS]
EXACT += [(name, "bf16") for name in ("zero2_offload", "zero3_offload", "zero3_offload_params")]
WIDE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 8, "num_layers": 2, "num_decoder_layers": 2}
# Python objects, pages of the libraries, DeepSpeed's buffers below the size of a parameter, the heap's fragments.
CONSTANT = 24e6
# Of the first, nearly all weights are frozen, so that a whole copy would be most of a rank's memory.
FREEZES = ("[encoder, decoder, embeddings]", "[decoder, embeddings]")
SAVED = Path("saved")


def make_bases(folder: Path) -> None:
    """`small` is tied and in float32; `stored` is untied and in bf16, and so is `wide`, of which memory is measured."""
    make_base(folder / "small", "t5")
    for name, overrides in (("stored", {}), ("wide", WIDE)):
        path = make_base(folder / name, "v1_1", **overrides)
        config = (path / "config.json").read_text(encoding="utf-8")
        from transformers import T5ForConditionalGeneration

        T5ForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
        (path / "config.json").write_text(config, encoding="utf-8")


def setup_of(ranks: Ranks, base: Path, ds_config: str, precision: str, *overrides: str) -> Setup:
    """What building a phase needs of a run: the demo's phase 0 on this base."""
    settings = [f"model.base={base}", "model.latent_dim=8", f"precision={precision}", *overrides]
    config = configuration.load(RunConfig, "demo", settings)
    tree = resolve(ds_config, precision)
    # Else DeepSpeed keeps the small parameters whole on every rank.
    tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if ds_config.startswith("zero3") else {}
    nothing: Any = None
    plans = phases.plan(config.phases, 100)
    return Setup(config, SAVED, ranks, precision, tree, *[nothing] * 6, plans)


def built(setup: Setup, source: Stored | None = None) -> PhaseEngine:
    model, weights = build_model(setup, setup.plans[0], source, is_start=True)
    return build_engine(setup, setup.plans[0], model, weights)


def saved(engine: PhaseEngine, ranks: Ranks, folder: Path) -> Stored:
    """The engine's state in files, as a checkpoint has them."""
    if ranks.is_main:
        folder.mkdir()
    distributed.barrier()
    part = engine.part()
    entries = distributed.gather_objects(shards.write(folder, part, ranks))
    manifest = {"shapes": part.shapes, "frozen": part.frozen, "shards": entries}
    return Stored(folder, shards.read_layout(folder, manifest), part.steps, part.scaler, None)


def check(engine: PhaseEngine, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The exact weights are the expected ones, and those of the forward pass are these, rounded."""
    found = engine.weights()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert value.dtype == found[name].dtype == torch.float32, name
        assert torch.equal(found[name], value), name
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.dtype == dtype, name
            assert torch.equal(parameter.detach().cpu(), expected[name].to(dtype)), name
    state = engine.state()
    assert state.steps == 0
    assert not any(tensor.any() for kind in MOMENTS for tensor in state.moments[kind].values())


def exact(ranks: Ranks, bases: Path, ds_config: str, precision: str) -> None:
    """From a base in float32 and one in bf16, from files, and from both with `reset_decoder`."""
    dtype = PRECISIONS[precision]
    for name in ("small", "stored"):
        setup = setup_of(ranks, bases / name, ds_config, precision, "phases.0.freeze=[decoder, embeddings]")
        expected = weights_of(T5VAE.from_base(setup.config.model, setup.config.seed))
        engine = built(setup)
        check(engine, expected, dtype)
        # Weights that no base has, so that nothing but the files can give them.
        moved = {key: torch.rand_like(value) for key, value in seeded(expected)}
        engine.load(as_state(moved, engine))
        stored = saved(engine, ranks, bases / f"{name}-{ds_config}-{precision}")
        engine.close()
        engine = built(setup, stored)
        check(engine, moved, dtype)
        engine.close()
        setup = setup_of(ranks, bases / name, ds_config, precision, "phases.0.reset_decoder=true", "phases.0.freeze=[]")
        mixed = {key: expected[key] if phases.group_of(key) == "decoder" else value for key, value in moved.items()}
        engine = built(setup, stored)
        check(engine, mixed, dtype)
        engine.close()
        stored.close()


def weights_of(model: T5VAE) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def seeded(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(5)
    yield from tensors.items()


def as_state(weights: dict[str, torch.Tensor], engine: PhaseEngine) -> Any:
    state = engine.state()
    state.weights = weights
    return state


class Highest(threading.Thread):
    """The most anonymous memory of this process above that of the beginning, in bytes, and where it was."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.where = 0, ""
        self._is_over = threading.Event()
        self._main = threading.main_thread().ident or 0

    def __enter__(self) -> "Highest":
        gc.collect()
        self._before = anonymous_bytes()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        while not self._is_over.wait(0.002):
            used = anonymous_bytes() - self._before
            if used > self.bytes:
                frames = traceback.extract_stack(sys._current_frames()[self._main])
                self.bytes, self.where = used, " > ".join(f"{frame.name}:{frame.lineno}" for frame in frames[-6:])


def memory(ranks: Ranks, bases: Path, precision: str, freeze: str) -> None:
    """At stage 3, a rank never has more than its part of the states and a few tensors: from a base and from files."""
    setup = setup_of(ranks, bases / "wide", "zero3", precision, f"phases.0.freeze={freeze}")
    built(setup).close()  # what the first engine of a process imports and keeps
    source = None
    for name in ("base", "files"):
        with Highest() as highest:
            engine = built(setup, source)
        sizes = {key: (p.ds_numel, p.requires_grad) for key, p in engine.module.named_parameters()}
        trained = sum(size for size, is_trained in sizes.values() if is_trained)
        frozen = sum(size for size, is_trained in sizes.values() if not is_trained)
        of_weight = 4 if precision == "fp32" else 2
        # Master, gradient and moments in float32; of a frozen weight, the exact value.
        states = ((of_weight + 16) * trained + (of_weight + 4) * frozen) / ranks.world
        tensor = 4 * max(size for size, _ in sizes.values())
        allowed = states + 2 * tensor + CONSTANT
        print(
            f"{precision} {freeze} {name}: {highest.bytes / 1e6:.0f} of {allowed / 1e6:.0f} MB in {highest.where}; "
            f"{states / 1e6:.0f} MB of states, {4 * (trained + frozen) / 1e6:.0f} MB of float32 weights"
        )
        assert highest.bytes < allowed
        if source is None:
            source = saved(engine, ranks, bases / f"wide-{precision}-{frozen}")
        engine.close()


def cases(bases: Path) -> dict[str, Callable[[Ranks], None]]:
    """All cases by name."""
    found: dict[str, Callable[[Ranks], None]] = {
        f"memory-{precision}-{number}": lambda ranks, one=(precision, freeze): memory(ranks, bases, *one)
        for precision in PRECISIONS
        for number, freeze in enumerate(FREEZES)
    }
    for ds_config, precision in EXACT:
        found[f"exact-{ds_config}-{precision}"] = lambda ranks, one=(ds_config, precision): exact(ranks, bases, *one)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), cases(Path(sys.argv[2])))
