"""Aggressive training: whose turn a step is, and which half a parameter belongs to."""

from collections.abc import Sequence
from dataclasses import asdict

import pytest

from support.tiny import base
from vae_ds.config.settings import AggressiveConfig, ModelConfig
from vae_ds.model.t5vae import T5VAE
from vae_ds.training.aggressive import DECODER, ENCODER, Aggressive, half_of
from vae_ds.training.trainer import TrainState


def turns(losses: Sequence[float], inner_steps: int, check_every: int) -> str:
    """E or D for each step, given the loss a token of each step, of 10 tokens."""
    settings, state, found = AggressiveConfig(inner_steps=inner_steps, check_every=check_every), Aggressive(), ""
    for loss in losses:
        half = state.half()
        assert half is not None
        found += half[0].upper()
        state.after_step(settings, 10 * loss, 10)
    return found


def test_the_decoders_turn_comes_when_a_stretch_is_no_better_than_the_one_before() -> None:
    falling = [9, 9, 8, 8, 7, 7]
    assert turns([*falling, 7, 8, 5, 5], 100, 2) == "EEEEEEEED" + "E"
    # The mean of a stretch decides, and not its last step.
    assert turns([9, 9, 1, 10, 5], 100, 2) == "EEEEE"
    # The first stretch after the decoder's step has none before it.
    assert turns([1, 1, 2, 2, 0, 9, 9, 9, 9], 100, 2) == "EEEEDEEEE"


def test_the_decoders_turn_comes_after_so_many_steps_at_the_latest() -> None:
    assert turns(range(20, 0, -1), 4, 2) == "EEEED" * 4
    assert turns(range(20, 0, -1), 3, 10) == "EEED" * 5


def test_it_ends_for_good_once_the_information_falls() -> None:
    state = Aggressive()
    for mi in (None, 1.0, 1.5, 1.5):
        state.after_validation(mi)
        assert state.half() == ENCODER
    state.after_validation(1.4)
    state.after_validation(2.0)
    assert state.half() is None


def test_it_goes_through_a_checkpoint() -> None:
    state = TrainState(aggressive=Aggressive(turn=DECODER, taken=3, before=2.5, best_mi=1.0))
    assert TrainState(**asdict(state)) == state


@pytest.mark.parametrize("injection", ["cross_attention", "self_attention+embedding"])
def test_every_parameter_is_in_one_half(injection: str) -> None:
    model = T5VAE.from_base(ModelConfig(base=base(), latent_dim=4, injection=injection), seed=0)
    found = {name: half_of(name) for name, _ in model.named_parameters()}
    assert {name for name, half in found.items() if half == ENCODER} == {
        name for name in found if name.startswith(("t5.encoder.", "bottleneck."))
    }
    assert any(".memory." in name and half == DECODER for name, half in found.items())
