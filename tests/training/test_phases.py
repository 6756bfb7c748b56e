"""Schedules by their formulas; plans, freezing and modes of the phase manager on a real model."""

import math
import re

import pytest
import torch
from transformers import T5ForConditionalGeneration

from support.models import groups_by_module
from support.tiny import base
from vae_ds.config.settings import ModelConfig, PhaseConfig
from vae_ds.errors import ConfigError
from vae_ds.model.t5vae import T5VAE
from vae_ds.training import phases, schedules


def phase(**settings: object) -> PhaseConfig:
    return PhaseConfig.model_validate({"name": "one", **settings})


def planned(steps_per_epoch: int = 10, **settings: object) -> phases.PhasePlan:
    return phases.plan([phase(**settings)], steps_per_epoch)[0]


def test_linear_beta_is_the_papers_equation_6() -> None:
    plan = planned(epochs=3, beta={"schedule": "linear", "over_epochs": 50})
    assert plan.steps == 30
    assert [plan.beta.at(step) for step in (0, 1, 29)] == [0.0, 1 / 500, 29 / 500]
    assert plan.beta.at(10_000) == 1.0


def test_linear_beta_over_a_fraction() -> None:
    plan = planned(steps=100, beta={"schedule": "linear", "over_fraction": 0.5, "max": 2})
    assert [plan.beta.at(step) for step in (0, 25, 50, 99)] == [0.0, 1.0, 2.0, 2.0]


def test_cyclical_beta_is_zero_then_ramps_then_holds() -> None:
    plan = planned(steps=100, beta={"schedule": "cyclical", "cycles": 2, "zero": 0.5, "ramp": 0.25})
    values = [plan.beta.at(step) for step in range(100)]
    assert values[:25] == [0.0] * 25
    assert values[38:50] == [1.0] * 12
    assert values[50:] == values[:50]
    assert values[31] == pytest.approx((31 / 50 - 0.5) / 0.25)
    assert plan.beta.at(100) == 1.0


def test_cyclical_beta_without_a_ramp_jumps_at_the_end_of_the_zero_part() -> None:
    plan = planned(steps=100, beta={"schedule": "cyclical", "cycles": 2, "zero": 0.5, "ramp": 0, "max": 3})
    assert [plan.beta.at(step) for step in (0, 24, 25, 49, 50, 75)] == [0.0, 0.0, 3.0, 3.0, 0.0, 3.0]


def test_target_beta_steers_the_kl() -> None:
    """On a toy whose KL falls as beta rises, the carried beta settles where the KL is the target."""
    beta = schedules.Target(kl=8.0, start=0.0, rate=0.02, max=1.0)
    value = beta.at(0)
    for step in range(2000):
        value = beta.carry(value, 16.0 / (1.0 + 5.0 * value))
        assert 0.0 <= beta.at(step, value) <= 1.0
    assert 16.0 / (1.0 + 5.0 * value) == pytest.approx(8.0, rel=1e-3)
    assert beta.carry(1.0, 1e9) == 1.0
    assert beta.carry(0.0, 0.0) == 0.0
    # The first step is at `start`, each other one at what the step before it left. A KL that is far too high, as in an
    # autoencoder's first steps, moves beta by the rate and no more.
    assert [schedules.Target(8.0, 0.3, 0.02, 1.0).at(7, carried) for carried in (None, 0.5, 0.0)] == [0.3, 0.5, 0.0]
    assert beta.carry(0.5, 1e9) == pytest.approx(0.52)
    assert beta.carry(0.5, 0.0) == pytest.approx(0.48)


def test_the_schedule_of_a_recipe_is_the_one_of_its_phase() -> None:
    """Each setting in its place: a swapped pair of numbers trains, too."""
    target = {"schedule": "target", "kl": 8, "start": 0.3, "rate": 0.02, "max": 0.9}
    assert planned(steps=7, beta=target).beta == schedules.Target(kl=8, start=0.3, rate=0.02, max=0.9)
    cyclical = {"schedule": "cyclical", "cycles": 3, "zero": 0.4, "ramp": 0.1, "max": 0.9}
    assert planned(steps=7, beta=cyclical).beta == schedules.Cyclical(0.9, total_steps=7, cycles=3, zero=0.4, ramp=0.1)
    linear = {"schedule": "linear", "over_steps": 5, "start": 0.2, "max": 0.9}
    assert planned(steps=7, beta=linear).beta == schedules.Linear(max=0.9, over_steps=5, total_steps=7, start=0.2)
    assert planned(steps=7, beta={"schedule": "constant", "value": 0.4}).beta == schedules.Constant(0.4)
    rate = {"schedule": "cosine", "warmup_steps": 2, "final": 0.1}
    expected = schedules.LearningRate("cosine", peak=0.5, warmup_steps=2, total_steps=7, final=0.1)
    assert planned(steps=7, optimizer={"lr": 0.5}, learning_rate=rate).learning_rate == expected


@pytest.mark.parametrize("fraction", [0.001, 0.01])
def test_a_rise_of_less_than_a_step_is_over_at_the_second_update(fraction: float) -> None:
    beta = planned(steps=100, beta={"schedule": "linear", "over_fraction": fraction, "start": 0.5}).beta
    assert [beta.at(step) for step in (0, 1, 99)] == [0.5, 1.0, 1.0]


def test_learning_rates() -> None:
    cosine = schedules.LearningRate("cosine", 2.0, 4, 104, 0.1)
    assert [cosine.at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert cosine.at(54) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert cosine.at(104) == cosine.at(10_000) == pytest.approx(0.2)
    linear = schedules.LearningRate("linear", 1.0, 0, 10, 0.0)
    assert [linear.at(0), linear.at(5), linear.at(10)] == [1.0, 0.5, 0.0]
    # In the middle and at the ends, a cosine has the values of a line.
    assert cosine.at(29) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))))
    assert linear.at(2) == pytest.approx(0.8)
    last_step_alone = schedules.LearningRate("linear", 1.0, 4, 5, 0.0)
    assert [last_step_alone.at(4), last_step_alone.at(5)] == [1.0, 0.0]
    all_warm_up = schedules.LearningRate("cosine", 1.0, 4, 4, 0.5)
    assert [all_warm_up.at(3), all_warm_up.at(4)] == [1.0, 1.0]
    assert schedules.LearningRate("constant", 1.0, 0, 10, 0.0).at(99) == 1.0


def test_phases_follow_each_other() -> None:
    plans = phases.plan([phase(epochs=0.5), phase(name="two", steps=7), phase(name="three", steps=2)], 10)
    assert [(plan.first_step, plan.steps) for plan in plans] == [(0, 5), (5, 7), (12, 2)]
    assert [(plan.index, plan.name, plan.steps_per_epoch) for plan in plans] == [
        (0, "one", 10),
        (1, "two", 10),
        (2, "three", 10),
    ]
    assert planned(epochs=0.1).steps == 1
    with pytest.raises(ConfigError, match=r"^phases\.0\.epochs: 0\.01 epochs of 10 steps is less than one step$"):
        phases.plan([phase(epochs=0.01)], 10)


def test_a_stream_has_no_epochs() -> None:
    """Its sentences are not counted: a length in epochs would be one of 0 steps, a rise in epochs one of 0 steps."""
    linear = {"schedule": "linear", "over_steps": 4}
    (only,) = phases.plan([phase(steps=5, beta=linear)], None)
    assert (only.steps, only.steps_per_epoch, only.beta.at(2)) == (5, None, 0.5)
    message = r"data\.streaming does not count the sentences; set steps$"
    with pytest.raises(ConfigError, match=rf"^phases\.1\.epochs: {message}"):
        phases.plan([phase(steps=5), phase(epochs=2)], None)
    with pytest.raises(ConfigError, match=rf"^phases\.1\.beta\.over_epochs: {message}"):
        phases.plan([phase(steps=5), phase(steps=5, beta={"schedule": "linear", "over_epochs": 2})], None)


def test_a_phase_is_named_or_numbered_from_1() -> None:
    names = ["warmup", "full", "2b"]
    assert [phases.number_of(given, names) for given in ("warmup", "2b", "1", "2", "3")] == [0, 2, 0, 1, 2]
    assert phases.number_of("2", ["2", "1"]) == 0, "a name before a number"
    for unknown in ("0", "4", "-1", "ful", ""):
        with pytest.raises(ConfigError, match=f"^no phase '{unknown}'; the recipe has warmup, full, 2b$"):
            phases.number_of(unknown, names)


OTHERS = [group for group in phases.GROUPS if group != "prior"]


@pytest.fixture
def model() -> T5VAE:
    return T5VAE.from_base(ModelConfig(base=str(base("t5")), latent_dim=4, dropout=0.1, prior="flow"))


def test_each_parameter_is_in_one_group(model: T5VAE) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert {name: phases.group_of(name) for name in names} == groups_by_module(model)
    assert {phases.group_of(name) for name in names} == set(phases.GROUPS)
    assert phases.group_of("t5.decoder.block.0.layer.1.o.weight") == "decoder"
    assert phases.group_of("t5.decoder.block.0.layer.1.memory.weight") == "memory"
    assert phases.group_of("t5.lm_head.weight") == "decoder", "the output layer of an untied base"
    with pytest.raises(ValueError, match="no group"):
        phases.group_of("something.else")
    # A new weight that does not count as one would learn at the low rate of the pretrained T5.
    old = list(T5ForConditionalGeneration.from_pretrained(base("t5")).parameters())
    for name, weight in model.named_parameters():
        assert phases.is_new(name) is not any(torch.equal(weight, pretrained) for pretrained in old), name


def test_freezing_by_group_and_pattern(model: T5VAE) -> None:
    frozen = phases.freeze(model, ["decoder", "t5.encoder.block.0.*"])
    groups = groups_by_module(model)
    first_block = {id(parameter) for parameter in model.t5.encoder.block[0].parameters()}
    for name, parameter in model.named_parameters():
        expected = groups[name] == "decoder" or id(parameter) in first_block
        assert (name in frozen) is expected is not parameter.requires_grad
    assert phases.freeze(model, []) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_prior_that_has_no_parameters_may_be_frozen() -> None:
    plain = T5VAE.from_base(ModelConfig(base=str(base("t5")), latent_dim=4))
    assert phases.freeze(plain, ["decoder", "prior"]) == phases.freeze(plain, ["decoder"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["encodr"],
            "`encodr` matches no parameter; groups are encoder, decoder, embeddings, memory, bottleneck",
        ),
        (["decoder", "t5.decoder.block.9.*"], "`t5.decoder.block.9.*` matches no parameter; groups are encoder, "),
        (list(phases.GROUPS), "encoder, decoder, embeddings, memory, bottleneck, prior leaves nothing to train"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_errors(model: T5VAE, patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(f'phases.1.freeze: {message}')}"):
        phases.freeze(model, patterns, "phases.1.freeze")


@pytest.mark.parametrize("also", [["embeddings", "memory"], ["embeddings"], []])
def test_frozen_modules_run_without_dropout(model: T5VAE, also: list[str]) -> None:
    """Nothing under a frozen decoder trains, whatever is trainable beside or inside it; the encoder does."""
    phases.freeze(model, ["decoder", *also])
    phases.train_mode(model)
    within = {name: module.training for name, module in model.named_modules() if name.startswith("t5.decoder")}
    active = {name for name, training in within.items() if training}
    assert active == {name for name in within if name.endswith("memory") and "memory" not in also} | (
        {"t5.decoder.embed_tokens"} if "embeddings" not in also else set()
    )
    assert all(module.training for name, module in model.named_modules() if name.startswith("t5.encoder.block"))
    phases.freeze(model, [])
    phases.train_mode(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"free_bits": {"mode": "total", "nats": 8.0}}, r"phases.2.free_bits.mode is total, .* use total_batch, "),
        ({"sample_posterior": False}, r"phases.2.sample_posterior is false, .* freeze `prior` and keep beta at 0$"),
        ({"denoise": 0.2, "freeze": OTHERS}, r"phases.2.denoise is 0.2, but the phase fits the prior alone, "),
    ],
)
def test_phases_that_a_learned_prior_does_not_fit_are_errors(model: T5VAE, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_prior(model, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"free_bits": {"mode": "total_batch", "nats": 8.0}},
        {"free_bits": {"mode": "per_dim", "nats": 0.0}},
        {"free_bits": {"mode": "per_dim", "nats": 1.0}, "freeze": ["encoder", "embeddings", "bottleneck"]},
        {"sample_posterior": False, "freeze": ["prior"], "beta": {"schedule": "constant", "value": 0.0}},
        {"denoise": 0.2},
        {"freeze": OTHERS},
    ],
)
def test_phases_that_a_learned_prior_fits(model: T5VAE, settings: dict) -> None:
    check_prior(model, settings)


def check_prior(model: T5VAE, settings: dict) -> None:
    phase = PhaseConfig.model_validate({"name": "x", "steps": 1} | settings)
    names = [name for name, _ in model.named_parameters()]
    phases.check_prior(phase, 2, set(names) - phases.frozen_names(names, phase.freeze))
