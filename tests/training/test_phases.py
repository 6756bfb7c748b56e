"""Schedules by their formulas; plans, freezing and modes of the phase manager on a real model."""

import pytest

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


def test_learning_rates() -> None:
    cosine = schedules.LearningRate("cosine", 2.0, 4, 104, 0.1)
    assert [cosine.at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert cosine.at(54) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert cosine.at(104) == cosine.at(10_000) == pytest.approx(0.2)
    linear = schedules.LearningRate("linear", 1.0, 0, 10, 0.0)
    assert [linear.at(0), linear.at(5), linear.at(10)] == [1.0, 0.5, 0.0]
    assert schedules.LearningRate("constant", 1.0, 0, 10, 0.0).at(99) == 1.0


def test_phases_follow_each_other() -> None:
    first, second = phases.plan([phase(epochs=0.5), phase(name="two", steps=7)], 10)
    assert (first.first_step, first.steps, second.first_step, second.steps) == (0, 5, 5, 7)
    with pytest.raises(ConfigError, match="less than one step"):
        phases.plan([phase(epochs=0.01)], 10)


@pytest.fixture
def model() -> T5VAE:
    return T5VAE.from_base(ModelConfig(base=str(base("t5")), latent_dim=4, dropout=0.1))


def test_each_parameter_is_in_one_group(model: T5VAE) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert {name: phases.group_of(name) for name in names} == groups_by_module(model)
    assert {phases.group_of(name) for name in names} == set(phases.GROUPS)
    assert phases.group_of("t5.decoder.block.0.layer.1.o.weight") == "decoder"
    assert phases.group_of("t5.decoder.block.0.layer.1.memory.weight") == "memory"
    with pytest.raises(ValueError, match="no group"):
        phases.group_of("something.else")


def test_freezing_by_group_and_pattern(model: T5VAE) -> None:
    frozen = phases.freeze(model, ["decoder", "t5.encoder.block.0.*"])
    groups = groups_by_module(model)
    first_block = {id(parameter) for parameter in model.t5.encoder.block[0].parameters()}
    for name, parameter in model.named_parameters():
        expected = groups[name] == "decoder" or id(parameter) in first_block
        assert (name in frozen) is expected is not parameter.requires_grad
    assert phases.freeze(model, []) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("patterns", [["encodr"], ["decoder", "t5.decoder.block.9.*"], list(phases.GROUPS)])
def test_patterns_that_match_nothing_or_everything_are_errors(model: T5VAE, patterns: list[str]) -> None:
    with pytest.raises(ConfigError):
        phases.freeze(model, patterns)


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
