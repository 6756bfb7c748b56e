"""The cases that each rank of test_engine.py runs: engines on a small network of odd sizes, compared with plain torch.

Shapes: B sentences of a micro batch, T tokens, G sentences of the global batch.
"""

import gc
import json
import math
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vae_ds import distributed
from vae_ds.config.settings import OptimizerConfig
from vae_ds.distributed.ranks import Ranks
from vae_ds.engine.phase_engine import PhaseEngine, StepOutcome, resolve
from vae_ds.engine.slices import KINDS, MOMENTS, WEIGHTS, PhaseState

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
# Each session is one launch of two ranks. `nvme` contains both precisions. The session `alone` has one rank.
SESSIONS = (*PRECISIONS, "nvme")
GLOBAL, WORDS, TOKENS = 12, 11, 3
CUTS = ((5,), (2, 5), (), (3,))  # where the micro batches of a step end, step by step
FROZEN = "middle."
# The weights of the network that do not decay, and those that a case trains with a rate of their own.
VECTORS = ("middle.bias", "norm.weight", "norm.bias", "out.bias")
NEW, FACTOR = "mu.", 3.0
# Widths that are not divisible by two ranks or by DeepSpeed's alignments. Only partitions of at least 1 MiB go to NVMe:
# with WIDE these are the weights of `middle` and `mu`, also at two ranks in 16 bits.
NARROW, WIDE = (6, 7, 5), (1201, 901, 1501)
# Names of the shipped ds_configs that were used for an engine.
started: set[str] = set()


class Output(NamedTuple):
    """A named tuple like the output of the model. The hooks of ZeRO-3 rebuild it."""

    loss_B: torch.Tensor
    mu_BX: torch.Tensor


class Network(nn.Module):
    """An embedding, three linear layers and a norm."""

    def __init__(self, widths: tuple[int, int, int] = NARROW) -> None:
        super().__init__()
        torch.manual_seed(0)
        width, middle, latent = widths
        self.embed = nn.Embedding(WORDS, width)
        self.middle = nn.Linear(width, middle)
        self.norm = nn.LayerNorm(middle)
        self.mu = nn.Linear(middle, latent, bias=False)
        self.out = nn.Linear(latent, WORDS)
        # AdamW moves each weight by the same amount at any width, so scale the sum.
        self.share = NARROW[1] / middle

    def code(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """A second entry point besides `forward`, like `encode` of the model."""
        return self.mu(self.norm(torch.tanh(self.middle(self.embed(ids_BT).mean(1))))) * self.share

    def forward(self, ids_BT: torch.Tensor, labels_B: torch.Tensor) -> Output:
        mu_BX = self.code(ids_BT)
        return Output(nn.functional.cross_entropy(self.out(mu_BX).float(), labels_B, reduction="none"), mu_BX.float())


def network(stage: int | str, weights: dict[str, torch.Tensor] | None = None, freeze: str | None = FROZEN) -> Network:
    """A float32 network on the CPU for an engine of this stage."""
    model = Network(WIDE if "nvme" in str(stage) else NARROW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights is not None:
                parameter.copy_(weights[name])
            parameter.requires_grad_(freeze is None or not name.startswith(freeze))
    return model


def engine(
    model: nn.Module,
    ranks: Ranks,
    stage: int | str,
    precision: str,
    half_of: Callable[[str], str] | None = None,
    is_new: Callable[[str], bool] | None = None,
    **optimizer: Any,
) -> PhaseEngine:
    """An engine. `stage` may name a shipped variant (`2_offload`) and a change from CHANGES (`3_nvme-pipelined`)."""
    known, _, change = str(stage).partition("-")
    number, _, variant = known.partition("_")
    name = f"zero{number}_{precision}" + (f"_{variant}" if variant else "")
    tree = resolve(name, precision)
    started.add(name)
    zero = tree["zero_optimization"]
    # DeepSpeed does not partition parameters below this size, and nearly all parameters here are smaller.
    zero |= {"stage3_param_persistence_threshold": 0} if number == "3" else {}
    zero |= CHANGES[change](zero) if change else {}
    return PhaseEngine(
        model,
        optimizer=OptimizerConfig(**{"weight_decay": 0.1, **optimizer}),
        ranks=ranks,
        precision=precision,
        ds_config=tree,
        half_of=half_of,
        is_new=is_new,
    )


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "persistent": lambda zero: {"stage3_param_persistence_threshold": 100_000},
    "pipelined": lambda zero: {
        "offload_optimizer": zero["offload_optimizer"]
        | {"pipeline_read": True, "pipeline_write": True, "buffer_count": 10}
    },
    "optimizer_alone": lambda zero: {"offload_param": {"device": "none"}},
    "weights_alone": lambda zero: {"offload_optimizer": {"device": "cpu"}},
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Global batch number `step`: ids_GT and labels_G."""
    draw = torch.Generator().manual_seed(100 + step)
    ids_GT = torch.randint(WORDS, (GLOBAL, TOKENS), generator=draw)
    return ids_GT, torch.randint(WORDS, (GLOBAL,), generator=draw)


def train_step(
    trained: PhaseEngine,
    ranks: Ranks,
    step: int,
    spoil: bool = False,
    half: str | None = None,
) -> tuple[float, StepOutcome]:
    """Train on one global batch. Returns the global mean loss and the outcome. `spoil`: NaN loss on the last rank.

    The number of micro batches differs between the steps, and their sizes differ within a step and between the ranks.
    """
    ids_GT, labels_G = batch(step)
    pieces = torch.arange(GLOBAL).tensor_split(CUTS[step % len(CUTS)])
    total = torch.zeros(())
    outcome = None
    for number, piece in enumerate(pieces):
        assert outcome is None, "an outcome inside an accumulation"
        rows = piece.tensor_split(ranks.world)[ranks.rank]
        output = trained.forward(ids_BT=ids_GT[rows], labels_B=labels_G[rows])
        total += output.loss_B.detach().sum()
        loss = output.loss_B.sum() * (ranks.world / GLOBAL)
        if spoil and number == 0 and ranks.rank == ranks.world - 1:
            loss = loss * math.nan
        trained.backward(loss, is_last=number == len(pieces) - 1)
        outcome = trained.step(lr_at(step), half)
    assert outcome is not None, "no outcome at the boundary"
    return float(distributed.all_sum(total)) / GLOBAL, outcome


def lr_at(step: int) -> float:
    return 1e-2 / (1 + step)


def assert_same(left: PhaseState, right: PhaseState, tolerance: float | None = None) -> None:
    """Assert that two states are equal bit by bit, or within an absolute tolerance."""

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a, b) if tolerance is None else torch.allclose(a, b, rtol=0, atol=tolerance)

    assert list(left.weights) == list(right.weights)
    assert left.steps == right.steps, (left.steps, right.steps)
    for name, value in left.weights.items():
        assert close(value, right.weights[name]), f"weight {name}: {(value - right.weights[name]).abs().max()}"
    for key in MOMENTS:
        assert list(left.moments[key]) == list(right.moments[key])
        for name, value in left.moments[key].items():
            assert close(value, right.moments[key][name]), f"{key} of {name}"


def assert_parts_are(trained: PhaseEngine, state: PhaseState) -> None:
    """Assert that the parts of all ranks cover the state exactly once, equal bit by bit."""
    part = trained.part()
    assert part.shapes == state.shapes
    assert set(part.frozen) == state.shapes.keys() - state.trained
    assert part.steps == state.steps
    parts = distributed.gather_objects(part.slices)
    for name, shape in state.shapes.items():
        found = sorted((one[name] for one in parts if name in one), key=lambda one: one.offset)
        ends = [one.offset + one.length for one in found]
        assert [one.offset for one in found] == [0, *ends[:-1]], (name, found)
        for kind in KINDS if name in state.trained else (WEIGHTS,):
            wanted = state.weights[name] if kind == WEIGHTS else state.moments[kind][name]
            assert torch.equal(torch.cat([one.values[kind] for one in found]).view(shape), wanted), (name, kind)


def assert_replicas(state: PhaseState) -> None:
    """Assert that all ranks have the same weights and moments."""
    tensors = [*state.weights.values(), *(value for key in MOMENTS for value in state.moments[key].values())]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    rows = distributed.gather_rows(flat[None])
    assert all(torch.equal(row, rows[0]) for row in rows), "the ranks have different states"


def plain_adam(model: nn.Module, half_of: Callable[[str], str] = str, **settings: Any) -> torch.optim.AdamW:
    """Torch's AdamW, with a group for each trainable parameter. Norms and biases do not decay."""
    groups: list[dict[str, Any]] = [
        {"params": [p], "half": half_of(name), "name": name, **({"weight_decay": 0.0} if name in VECTORS else {})}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=0.0, **{"weight_decay": 0.1, **settings})


def parity(ranks: Ranks, stage: int | str, clip: float, freeze: str | None = FROZEN) -> None:
    """Float32 training equals plain torch on the global batch: losses, norms, weights, moments; frozen parts stay."""
    # The smallest gradients of a wide network are noise. With a small epsilon, AdamW scales them up like all others.
    eps = 1e-4 if "nvme" in str(stage) else 1e-8
    plain = network(stage, freeze=freeze)
    trainable = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    adam = plain_adam(plain, betas=(0.9, 0.999), eps=eps)
    trained = engine(network(stage, freeze=freeze), ranks, stage, "fp32", clip=clip, eps=eps)
    clipped = False
    for step in range(4):
        loss, outcome = train_step(trained, ranks, step)
        ids_GT, labels_G = batch(step)
        expected = plain(ids_GT, labels_G).loss_B.mean()
        expected.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, clip if clip > 0 else math.inf))
        for group in adam.param_groups:
            group["lr"] = lr_at(step)
        adam.step()
        adam.zero_grad()
        clipped |= 0 < clip < norm
        assert outcome.applied
        assert math.isclose(loss, expected.item(), abs_tol=1e-5), (step, loss, expected)
        assert math.isclose(outcome.grad_norm, norm, rel_tol=1e-4), (step, outcome.grad_norm, norm)
        with torch.no_grad():
            # Between the steps, validation calls other methods of the module.
            code = trained.module.code(ids_GT)
        assert torch.allclose(code, plain.code(ids_GT), atol=1e-5)
    assert clipped == (clip > 0), "the gradient norms do not fit the clip value of this case"
    state = trained.state()
    assert state.steps == 4
    for name, parameter in plain.named_parameters():
        assert torch.allclose(state.weights[name], parameter, rtol=0, atol=1e-5), name
        if parameter.requires_grad:
            for key in MOMENTS:
                assert torch.allclose(state.moments[key][name], adam.state[parameter][key], rtol=1e-3, atol=1e-6), name
    trained.close()


def phases(ranks: Ranks, stage: int | str, precision: str) -> None:
    """Frozen tensors stay equal bit by bit, all others change, and the next phase's engine starts from this state."""
    start = {name: parameter.detach().clone() for name, parameter in network(stage).named_parameters()}
    first = engine(network(stage), ranks, stage, precision)
    state = first.state()
    assert all(torch.equal(state.weights[name], value) for name, value in start.items()), (
        "the initial weights differ from the given ones"
    )
    assert state.steps == 0
    assert all(not value.any() for key in MOMENTS for value in state.moments[key].values())
    for step in range(2):
        assert train_step(first, ranks, step)[1].applied
    state = first.state()
    assert state.steps == 2
    for name, value in start.items():
        assert torch.equal(state.weights[name], value) == name.startswith(FROZEN), name
        assert (name in state.moments["exp_avg"]) != name.startswith(FROZEN), name
    assert_replicas(state)
    optimizer = weakref.ref(first._engine.optimizer)
    engine_ref = weakref.ref(first._engine)
    first.close()
    gc.collect()
    assert engine_ref() is None, "the closed engine is still alive"
    assert optimizer() is None, "the closed engine's optimizer is still alive"

    plain = network(stage, state.weights, freeze=None)
    second = engine(network(stage, state.weights, freeze=None), ranks, stage, precision)
    handed = second.state()
    assert all(torch.equal(handed.weights[name], value) for name, value in state.weights.items()), (
        "the weights of the next phase differ from the given ones"
    )
    ids_GT, labels_G = batch(0)
    with torch.no_grad():
        output = second.forward(ids_BT=ids_GT, labels_B=labels_G)
        assert torch.allclose(output.loss_B, plain(ids_GT, labels_G).loss_B, atol=1e-5 if precision == "fp32" else 0.1)
    assert train_step(second, ranks, 2)[1].applied
    moved = second.state()
    assert not any(torch.equal(moved.weights[name], value) for name, value in state.weights.items())
    assert_replicas(moved)
    second.close()


def skipped(ranks: Ranks, stage: int | str, precision: str) -> None:
    """A NaN on one rank skips the step on all ranks, and does not change the state or later steps.

    The reference is a second engine, built on other weights (also frozen ones), that loads the state before the NaN.
    """
    trained = engine(network(stage), ranks, stage, precision)
    assert train_step(trained, ranks, 0)[1].applied
    before = trained.state()
    _, outcome = train_step(trained, ranks, 1, spoil=True)
    assert not outcome.applied
    assert not math.isfinite(outcome.grad_norm)
    assert_same(before, trained.state())
    assert_parts_are(trained, before)

    twin = engine(network(stage, {name: value + 1 for name, value in before.weights.items()}), ranks, stage, precision)
    twin.load(before)
    assert_same(before, twin.state())
    ids_GT, labels_G = batch(5)
    with torch.no_grad():
        outputs = [each.forward(ids_BT=ids_GT, labels_B=labels_G).loss_B for each in (trained, twin)]
    assert torch.equal(*outputs), "the forward weights differ from the loaded ones"
    results = [train_step(each, ranks, 2) for each in (trained, twin)]
    assert results[0][1].applied
    assert results[0] == results[1]
    assert_same(trained.state(), twin.state())
    trained.close()
    twin.close()


def halves(ranks: Ranks, stage: int | str, precision: str) -> None:
    """A step of one half changes only this half; in float32 it equals torch's AdamW with learning rate 0 for the other.

    A second engine loads the state and takes the same next step.
    """

    def half_of(name: str) -> str:
        return "decoder" if name.startswith("out.") else "encoder"

    trained = engine(network(stage), ranks, stage, precision, half_of=half_of)
    plain = network(stage)
    adam = plain_adam(plain, half_of)
    before = trained.state()
    for step, half in enumerate(("encoder", "decoder", None, "encoder")):
        assert train_step(trained, ranks, step, half=half)[1].applied
        after = trained.state()
        for name, value in after.weights.items():
            stays = name.startswith(FROZEN) or half not in (None, half_of(name))
            assert torch.equal(value, before.weights[name]) == stays, (step, half, name)
        before = after
        adam.zero_grad()
        plain(*batch(step)).loss_B.mean().backward()
        for group in adam.param_groups:
            group["lr"] = lr_at(step) if half in (None, group["half"]) else 0.0
        adam.step()
    if precision == "fp32":
        for name, parameter in plain.named_parameters():
            assert torch.allclose(before.weights[name], parameter, rtol=1e-4, atol=1e-5), name
    twin = engine(network(stage), ranks, stage, precision, half_of=half_of)
    twin.load(before)
    assert_same(before, twin.state())
    results = [train_step(each, ranks, 9, half="decoder") for each in (trained, twin)]
    assert results[0] == results[1]
    assert_same(trained.state(), twin.state())
    trained.close()
    twin.close()


def groups(ranks: Ranks, stage: int | str) -> None:
    """New weights with a rate of their own, norms and biases without decay: as torch's AdamW with these groups.

    The engine resumes from a state that was made without groups. A phase that freezes the new weights has no group of
    them.
    """

    def is_new(name: str) -> bool:
        return name.startswith(NEW)

    def plain_step(step: int, factor: float) -> None:
        adam.zero_grad()
        plain(*batch(step)).loss_B.mean().backward()
        for group in adam.param_groups:
            group["lr"] = lr_at(step) * (factor if is_new(group["name"]) else 1.0)
        adam.step()

    plain = network(stage)
    adam = plain_adam(plain, weight_decay=0.0)
    before = engine(network(stage), ranks, stage, "fp32", weight_decay=0.0)
    assert len(before._adam.param_groups) == 1
    for step in range(2):
        assert train_step(before, ranks, step)[1].applied
        plain_step(step, 1.0)
    state = before.state()
    before.close()
    settings: dict[str, Any] = {"is_new": is_new, "new_weights_lr_factor": FACTOR}
    after = engine(network(stage), ranks, stage, "fp32", **settings)
    assert len(after._adam.param_groups) == 3
    after.load(state)
    for group in adam.param_groups:
        group["weight_decay"] = 0.0 if group["name"] in VECTORS else 0.1
    for step in range(2, 6):
        assert train_step(after, ranks, step)[1].applied
        plain_step(step, FACTOR)
    state = after.state()
    after.close()
    assert state.steps == 6
    for name, parameter in plain.named_parameters():
        assert torch.allclose(state.weights[name], parameter, rtol=0, atol=1e-5), name
        if parameter.requires_grad:
            for key in MOMENTS:
                assert torch.allclose(state.moments[key][name], adam.state[parameter][key], rtol=1e-3, atol=1e-6), name
    assert_replicas(state)

    frozen = engine(network(stage, state.weights, freeze=NEW), ranks, stage, "fp32", **settings)
    assert train_step(frozen, ranks, 6)[1].applied
    moved = frozen.state().weights
    frozen.close()
    for name, value in state.weights.items():
        assert torch.equal(moved[name], value) == is_new(name), name


def cases(session: str) -> dict[str, Callable[[Ranks], None]]:
    """All cases of a session by name, in the order in which they run."""
    found: dict[str, Callable[[Ranks], None]] = {}

    def add(name: str, work: Callable[..., None], *arguments: Any) -> None:
        found[name] = lambda ranks: work(ranks, *arguments)

    def add_both(stage: int | str, precision: str) -> None:
        for work in (phases, skipped):
            add(f"{work.__name__}-zero{stage}-{precision}", work, stage, precision)

    if session in ("fp32", "alone"):
        for stage in (*STAGES, *(["2_offload", "3_offload_params"] if session == "fp32" else [])):
            add(f"groups-zero{stage}", groups, stage)
    if session == "alone":
        for stage in STAGES:
            add(f"parity-zero{stage}-clip", parity, stage, 0.05)
            add_both(stage, "fp32")
        return found
    offloads = ["1_offload", "2_offload", "3_offload", "3_offload_params"]
    if session == "nvme":
        add("parity-zero3_nvme", parity, "3_nvme", 0.05)
        for change in ("pipelined", "optimizer_alone", "weights_alone"):
            add(f"parity-zero3_nvme-{change}", parity, f"3_nvme-{change}", 0.05, None)
        add("skipped-zero3_nvme-pipelined-bf16", skipped, "3_nvme-pipelined", "bf16")
        for precision in PRECISIONS:
            add_both("3_nvme", precision)
        return found
    if session == "fp32":
        clipped = [(stage, 0.05) for stage in (*STAGES, *offloads)]
        for stage, clip in [*clipped, (0, 0.0), (2, 0.0), ("3-persistent", 0.0)]:
            add(f"parity-zero{stage}-{'clip' if clip else 'no_clip'}", parity, stage, clip)
    for stage in (*STAGES, "2_offload", "3_offload_params"):
        add(f"halves-zero{stage}-{session}", halves, stage, session)
    for stage in (*STAGES, *(["2_offload", "3_offload_params"] if session == "fp32" else ["3-persistent", *offloads])):
        add_both(stage, session)
    return found


def main(results: Path, works: dict[str, Callable[[Ranks], None]]) -> None:
    """Run the cases in order. Each rank writes its results, and exits at the first failure: ranks are out of step."""
    ranks = distributed.start()
    resolve("zero0", "fp32")
    # DeepSpeed and the tear-down collect garbage for each engine. Exclude the imported objects, to save time.
    gc.collect()
    gc.freeze()
    outcomes: dict[str, Any] = {}
    path = results / f"rank{ranks.rank}.json"
    for name, work in works.items():
        try:
            work(ranks)
            outcomes[name] = "ok"
        except Exception:
            outcomes[name] = traceback.format_exc()
        path.write_text(json.dumps(outcomes | {"started": sorted(started)}))
        if outcomes[name] != "ok":
            print(name, outcomes[name], flush=True)
            os._exit(1)
    distributed.finish()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), cases(sys.argv[2]))
