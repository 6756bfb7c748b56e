"""What several files of this folder need: a model, the server of its page, texts with labels."""

import threading
from collections.abc import Iterator

import pytest

from support import tiny
from support.models import taught
from vae_ds.inspection import Labelled, server
from vae_ds.model import load_tokenizer
from vae_ds.textvae import TextVAE

TEXTS = list(tiny.ENGLISH[:12])


@pytest.fixture(scope="session")
def vae() -> TextVAE:
    """Its texts differ from code to code."""
    return TextVAE(taught(5), load_tokenizer(tiny.base()), 40, device="cpu")


@pytest.fixture(scope="module")
def served(vae: TextVAE) -> Iterator[server.Server]:
    """The page, with the corpus `tiny.ENGLISH[:12]` and two labels that alternate."""
    explorer = server.Explorer(vae, TEXTS, ["even", "odd"] * 6, "mine")
    with server.Server(explorer) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


@pytest.fixture(scope="session")
def labelled() -> Labelled:
    """Two labels, each with its own things."""
    pairs = [(text, thing) for text in tiny.ENGLISH[:200] for thing in ("chair", "bicycle") if thing in text]
    return Labelled([text for text, _ in pairs], {"label": [thing for _, thing in pairs]})
