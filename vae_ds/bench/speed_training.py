"""The measures of `vae-ds bench speed` that are about training steps. Each returns its rows."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from vae_ds.bench import contestants
from vae_ds.bench.contest import Host, Middle, Round, alternate, middle, ratio
from vae_ds.bench.profiles import PROFILES, lengths
from vae_ds.bench.speed_rows import Place, Row, row_of
from vae_ds.config import ModelConfig, RunConfig
from vae_ds.data import Batch, epoch_batches
from vae_ds.model import T5VAE, footprint_of, skeleton
from vae_ds.training import phases

PHASES = {0: "phase 1", 1: "phase 2"}


def published(place: Place) -> list[Row]:
    """Sentences per second against a loop that works as the published code does."""
    rows = []
    profiles = ["snli"] if place.is_quick else list(PROFILES)
    for phase, told in PHASES.items():
        specs = {name: place.spec("ours", name, batch=8, phase=phase) for name in profiles}
        specs["published"] = place.spec("published", "yahoo", batch=8, phase=phase)
        steps = {"snli": 4, "ptb": 3, "yahoo": 2, "published": 1}
        with place.host(specs, f"published-{phase}") as host:
            found = alternate(dict.fromkeys(specs, host), steps, 1 if place.is_quick else 4, warm=1)
        for name in profiles:
            counted = _per_sentence(found["published"], "operations") / _per_sentence(found[name], "operations")
            faster = ratio(found["published"], found[name], lambda one: one.seconds / one.sentences)
            rows.append(
                row_of(
                    "published", f"{told}, lengths of {name}, {place.shape} shape", "times the speed", faster,
                    (max(1.0, 0.9 * counted), None), counted=counted, **_rates(found, name, "published"),
                    **_shares(found[name]), **_shares(found["published"], "published_"),
                )
            )  # fmt: skip
    return rows


def memory(place: Place) -> list[Row]:
    """The largest sum of all tensors in a step without weights, gradients and moments, counted exactly."""
    return [
        _memory(place, phase, name) for phase in PHASES for name in (["snli"] if place.is_quick else list(PROFILES))
    ]


def _memory(place: Place, phase: int, profile: str) -> Row:
    spec = place.spec("ours", profile, batch=8, phase=phase)
    config, sentences = contestants.recipe(spec), spec["batch"]
    lengths_N = lengths(profile, 64 * sentences).clip(max=spec["max_tokens"])
    order_SG = epoch_batches(lengths_N, sentences, config.batch.bucket_batches, config.seed, phase, 0)
    widest = int(lengths_N[order_SG].max())

    def ours(model: T5VAE) -> torch.Tensor:
        terms = model(**_batch(model, sentences, widest).arguments())
        return terms.rec_B.sum() + terms.kl_BL.sum()

    def published(model: T5VAE) -> torch.Tensor:
        return contestants.published_loss(model, _batch(model, sentences, spec["width"]))

    other = config.model.model_copy(update={"injection": "self_attention"})
    ours_mb, published_mb = (
        footprint_of(settings, loss, frozen=_frozen(config, phase, settings)).peak_bytes / 1e6
        for settings, loss in ((config.model, ours), (other, published))
    )
    facts = {"ours_mb": ours_mb, "published_mb": published_mb, "tokens": widest}
    case = f"{PHASES[phase]}, lengths of {profile}, {place.shape} shape, widest batch"
    return Row("memory", case, "times the memory", ours_mb / published_mb, pairs=1, goal=(None, 0.4), facts=facts)


def huggingface(place: Place) -> list[Row]:
    """Target tokens per second against the Trainer of transformers on the stock T5."""
    rows = []
    for shape, batch, steps in (("shipped", 64, 4), (place.shape, 16, 2)):
        # `group_by_length` pads least from 200 batches on.
        specs = {"ours": place.spec("ours", "ptb", batch=batch, batches=256, shape=shape)}
        specs["as it comes"] = place.spec("huggingface", "ptb", batch=batch, batches=256, shape=shape)
        specs["group_by_length"] = specs["as it comes"] | {"by_length": True}
        with ExitStack() as stack:
            hosts = {
                name: stack.enter_context(place.host({name: spec}, f"huggingface-{shape}-{name[:5].strip()}"))
                for name, spec in specs.items()
            }
            found = alternate(hosts, dict.fromkeys(specs, steps), place.rounds)
        for name in ("as it comes", "group_by_length"):
            faster = ratio(found["ours"], found[name], lambda one: one.tokens / one.seconds)
            case = f"{name}, {_shape(shape)}, batch {batch}"
            rows.append(
                row_of(
                    "huggingface", case, "times the tokens/s", faster, (1.15, None),
                    **_rates(found, "ours", name), **_shares(found["ours"]),
                )
            )  # fmt: skip
        if place.is_quick:
            break
    return rows


def loop(place: Place) -> list[Row]:
    """The time of a step above that of a plain PyTorch loop with the same model, batches and objective."""
    rows = []
    for shape, profile, batch, steps in (("shipped", "ptb", 64, 4), (place.shape, "ptb", 16, 2)):
        specs = {kind: place.spec(kind, profile, batch=batch, shape=shape) for kind in ("ours", "bare")}
        with place.host(specs, f"loop-{shape}") as host:
            found = alternate(dict.fromkeys(specs, host), dict.fromkeys(specs, steps), place.rounds)
        lost = ratio(found["ours"], found["bare"], lambda one: one.seconds / one.operations)
        above = Middle(100 * (lost.value - 1), 100 * (lost.low - 1), 100 * (lost.high - 1), lost.of)
        row = row_of(
            "loop", f"{_shape(shape)}, batch {batch}", "% more time", above, (None, 5.0),
            **_rates(found, "ours", "bare"), **_shares(found["ours"]), **_shares(found["bare"], "bare_"),
        )  # fmt: skip
        rows.append(Row(**{**vars(row), "is_noisy": lost.is_noisy}))
        if place.is_quick:
            break
    return rows


def compiled(place: Place) -> list[Row]:
    """The time of a step of a plain loop with compiled blocks, as a multiple of the same loop's without."""
    cases = [("shipped", 64, 0.1), ("shipped", 64, 0.0), (place.shape, 16, 0.1)]
    if place.is_quick:
        return [Row("compile", "plain loops", "times the time", reason="not in the quick size")]
    rows = []
    for shape, batch, dropout in cases:
        spec = place.spec("bare", "ptb", batch=batch, shape=shape, set=[f"model.dropout={dropout}"])
        specs = {"as it is": spec, "compiled": spec | {"compile": True}}
        with place.host(specs, f"compile-{shape}-{dropout:g}") as host:
            found = alternate(dict.fromkeys(specs, host), dict.fromkeys(specs, 2), place.rounds)
        longer = ratio(found["compiled"], found["as it is"], lambda one: one.seconds / one.operations)
        case = f"plain loops, {_shape(shape)}, batch {batch}, dropout {dropout:g}"
        rows.append(row_of("compile", case, "times the time", longer, (None, None), **_rates(found, *specs)))
    return rows


def ranks(place: Place) -> list[Row]:
    """Tokens per second of two ranks, one thread each, as a multiple of one."""
    if place.is_quick:
        return [Row("ranks", "2 ranks on CPUs", "times the tokens/s", goal=(1.8, None), reason="not in the quick size")]
    specs = {
        f"{told}, ZeRO {stage}": place.spec("ours", "ptb", batch=64, phase=phase, stage=stage, shape="shipped")
        for phase, told in PHASES.items()
        for stage in (1, 2)
    }
    rows = []
    with place.host(specs, "ranks-one") as one, place.host(specs, "ranks-two", processes=2) as two:
        for name in specs:
            found = _one_and_two(one, two, name, place.rounds)
            faster = ratio(found["2"], found["1"], lambda part: part.tokens / part.seconds)
            case = f"{name}, shipped tiny T5, batch 64, one thread each"
            facts = {**_rates(found, "1", "2"), **_shares(found["1"], "one_"), **_shares(found["2"], "two_")}
            rows.append(row_of("ranks", case, "times the tokens/s", faster, (1.8, None), **facts))
    return [*rows, *(_side_by_side(place, phase) for phase in PHASES)]


def _side_by_side(place: Place, phase: int) -> Row:
    """The limit of the machine: two plain loops, each with half of the batch, that do not know of each other."""
    specs = [{"loop": place.spec("bare", "ptb", batch=batch, phase=phase, shape="shipped")} for batch in (64, 32)]
    folders = [f"side-{phase}-{count}" for count in (1, 2)]
    with place.host(specs[0], folders[0]) as one, place.host(specs[1], folders[1], processes=2) as two:
        found = _one_and_two(one, two, "loop", place.rounds)
    faster = ratio(found["2"], found["1"], lambda part: part.tokens / part.seconds)
    both = Middle(2 * faster.value, 2 * faster.low, 2 * faster.high, faster.of)
    case = f"{PHASES[phase]}, two plain loops side by side, the same T5, batch 32 each"
    return row_of("ranks", case, "times the tokens/s", both, (None, None), **_rates(found, "1", "2"))


def _one_and_two(one: Host, two: Host, name: str, rounds: int) -> dict[str, list[Round]]:
    """Four steps each, in turns, of a contestant that has the same name in a host of one rank and one of two."""
    return alternate({"1": _Named(one, name), "2": _Named(two, name)}, {"1": 4, "2": 4}, rounds)


class _Named:
    """One contestant of a host, under another name."""

    def __init__(self, host: Any, name: str) -> None:
        self._host, self._name = host, name

    def go(self, name: str, steps: int) -> Any:
        return self._host.go(self._name, steps)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def phases_by_count(place: Place) -> list[Row]:
    """The time of a step of phase 1 to that of phase 2, divided by the quotient of their operations.

    The frozen decoder of phase 1 has no dropout, whose time is not counted. So there is a row without dropout, too.
    """
    rates = (0.1,) if place.is_quick else (0.1, 0.0)
    return [_phases_by_count(place, dropout) for dropout in rates]


def _phases_by_count(place: Place, dropout: float) -> Row:
    changes = [f"model.dropout={dropout}"]
    specs = {told: place.spec("ours", "ptb", batch=16, phase=phase, set=changes) for phase, told in PHASES.items()}
    with place.host(specs, f"phases-{dropout:g}") as host:
        found = alternate(dict.fromkeys(specs, host), dict.fromkeys(specs, 2), place.rounds)
    first, second = (found[name] for name in specs)
    value = ratio(first, second, lambda one: one.seconds / one.operations)
    facts = {"time": ratio(first, second, lambda one: one.seconds / one.tokens).value}
    facts["counted"] = ratio(first, second, lambda one: one.operations / one.tokens).value
    facts |= {**_shares(first, "first_"), **_shares(second, "second_")}
    case = f"phase 1 to phase 2, {place.shape} shape, dropout {dropout:g}"
    return row_of("phases", case, "time by operations", value, (0.9, 1.1), **facts)


def mfu(place: Place) -> list[Row]:
    """Operations per second, as a share of those of a large product of matrices."""
    rows = []
    for profile, batch in (("snli", 64), ("yahoo", 8)):
        specs = {"ours": place.spec("ours", profile, batch=batch), "matrix": {"kind": "matrix"}}
        with place.host(specs, f"mfu-{profile}") as host:
            found = alternate(dict.fromkeys(specs, host), {"ours": 1, "matrix": 2}, place.rounds, warm=1)
        share = ratio(found["ours"], found["matrix"], lambda one: one.operations / one.seconds)
        percent = Middle(100 * share.value, 100 * share.low, 100 * share.high, share.of)
        rate = middle([one.operations / one.seconds for one in found["matrix"]]).value
        case = f"CPU, {place.shape} shape, float32, lengths of {profile}, batch {batch}, one thread"
        facts = {"matrix_gflops": rate / 1e9, **_rates(found, "ours"), **_shares(found["ours"])}
        rows.append(row_of("mfu", case, "% of the matrix rate", percent, (70.0, None), **facts))
        if place.is_quick:
            break
    return rows


def _rates(found: dict[str, list[Round]], *names: str) -> dict[str, float]:
    """Target tokens per second of some contestants, medians."""
    return {
        f"tokens_per_s_{name.replace(' ', '_')}": round(
            middle([one.tokens / one.seconds for one in found[name]]).value, 1
        )
        for name in names
    }


def _shares(rounds: Sequence[Round], whose: str = "") -> dict[str, float]:
    """The parts of the steps of a contestant, medians, where it tells them."""
    return {f"{whose}{name}": round(middle([one.shares[name] for one in rounds]).value, 4) for name in rounds[0].shares}


def _per_sentence(rounds: Sequence[Round], what: str) -> float:
    return float(sum(getattr(one, what) for one in rounds) / sum(one.sentences for one in rounds))


def _shape(shape: str) -> str:
    return "shipped tiny T5" if shape == "shipped" else f"{shape} shape"


def _frozen(config: RunConfig, phase: int, settings: ModelConfig) -> set[str]:
    names = [name for name, _ in skeleton(settings).named_parameters()]
    return phases.frozen_names(names, config.phases[phase].freeze)


def _batch(model: T5VAE, sentences: int, tokens: int) -> Batch:
    ids_BT = torch.zeros(sentences, tokens, dtype=torch.long)
    eps_BL, one_B = torch.zeros(sentences, model.latent_dim), torch.ones(sentences)
    return Batch(ids_BT[:, 0], ids_BT, torch.ones_like(ids_BT), ids_BT, eps_BL, one_B, ids_BT.numel())
