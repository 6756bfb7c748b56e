"""The length profiles: their means are those of the paper's rows, and texts have exactly these lengths."""

import numpy as np
import pytest

from vae_ds.bench import profiles
from vae_ds.errors import ConfigError
from vae_ds.model import load_tokenizer


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_lengths_have_the_printed_mean(name: str) -> None:
    told, found_N = profiles.PROFILES[name], profiles.lengths(name, 20_000)
    assert found_N.mean() == pytest.approx(told.mean_tokens, rel=0.03)
    assert found_N.min() >= 2
    assert found_N.max() <= told.max_tokens
    assert np.array_equal(found_N, profiles.lengths(name, 20_000))
    assert not np.array_equal(found_N, profiles.lengths(name, 20_000, seed=1))


def test_a_text_has_the_length_that_was_drawn() -> None:
    tokens = load_tokenizer("tiny")(profiles.texts("snli", 50, seed=3))["input_ids"]
    assert [len(row) for row in tokens] == profiles.lengths("snli", 50, seed=3).tolist()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="no length profile imdb; the profiles are ptb, snli, yahoo"):
        profiles.lengths("imdb", 1)
