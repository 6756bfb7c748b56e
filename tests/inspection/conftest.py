"""A model for all tests of this folder."""

import pytest

from support import tiny
from support.models import taught
from vae_ds.model import load_tokenizer
from vae_ds.textvae import TextVAE


@pytest.fixture(scope="session")
def vae() -> TextVAE:
    """Its texts differ from code to code."""
    return TextVAE(taught(5), load_tokenizer(tiny.base()), 40, device="cpu")
