"""Publish an export on the Hugging Face hub.

A push is one commit: the hub shows all of it or nothing. The large files are sent before. If it is interrupted, the
same push sends only what the hub does not have yet.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, errors, utils

from vae_ds.config import hub
from vae_ds.errors import ConfigError, Failed
from vae_ds.model import auto_code, read_export
from vae_ds.runtime import run_dirs
from vae_ds.sharing.card import CARD, card_text

Value = TypeVar("Value")

MAIN = "main"
# Not of the model: the values of single sentences, results with paths of this machine, adapters that name such a path.
LEFT_OUT = ("eval-*", "adapters", ".*")


def push(run: Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Push the model of a run directory or an export to OWNER/NAME on the hub, and return the address of the commit.

    The repository is created if it does not exist. The card, the configuration and the code for transformers are
    sent as they are, without paths of this machine.

    private: only the owner can read the repository. An existing public one is refused.
    revision: a branch, which is created if it does not exist. None means `main`.
    Raises CheckpointError without a model; ConfigError for a wrong name, without a token, or if the hub refuses it;
    Failed if the hub cannot be reached or the connection breaks. Nothing is changed then.
    """
    hub.check_name(name)
    folder = run_dirs.model_of(run)
    read_export(folder)
    if hub.is_offline():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if huggingface_hub.get_token() is None:
        raise ConfigError("no token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN")
    if not hub.is_reachable():
        raise Failed(f"{hub.endpoint()} cannot be reached; nothing was pushed")
    api = HfApi(endpoint=hub.endpoint())
    _asked(name, lambda: api.create_repo(name, private=private or None, exist_ok=True))
    if private and not _asked(name, lambda: api.model_info(name)).private:
        raise ConfigError(
            f"{name} exists and is public; nothing was pushed; push without --private, or use another name"
        )
    if revision not in (None, MAIN):
        _asked(name, lambda: api.create_branch(name, branch=str(revision), exist_ok=True))
    message = f"Push {run.name} with vae_ds"
    with _bars_on_terminals():
        done = _asked(name, lambda: api.create_commit(name, files(folder), commit_message=message, revision=revision))
    return str(done.commit_url)


def files(folder: Path) -> list[CommitOperationAdd]:
    """What is pushed of an export."""
    described = read_export(folder)
    base = Path(described["model"]["base"])
    if base.is_absolute():
        described["model"]["base"] = base.name
    config = json.dumps(described | auto_code.entries(described.get("dtype", "float32")), indent=2, ensure_ascii=False)
    made = {"config.json": f"{config}\n", auto_code.CODE: auto_code.source()}
    if not (folder / CARD).is_file():
        made[CARD] = card_text(folder)
    sent = {path: text.encode() for path, text in made.items()}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if file.is_file() and str(place) not in sent and not _is_left_out(place):
            sent[place.as_posix()] = str(file)  # type: ignore[assignment]
    return [CommitOperationAdd(path, content) for path, content in sent.items()]


def _is_left_out(place: Path) -> bool:
    return any(fnmatch(part, pattern) for part in place.parts for pattern in LEFT_OUT)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _asked(name: str, ask: Callable[[], Value]) -> Value:
    """What the hub answers. Its errors become one line."""
    try:
        return ask()
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ConfigError("the hub does not accept the token; log in again with `hf auth login`") from None
        if status in (403, 404):
            raise ConfigError(
                f"{name}: the token may not write there; check the owner and the rights of the token"
            ) from None
        if status < 500:
            raise ConfigError(f"{name}: the hub refuses it: {_line(error.server_message or error)}") from None
        raise Failed(f"{name}: the hub has a fault ({status}); nothing was changed there; try again later") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        raise Failed(
            f"{name}: the connection to the hub broke ({type(error).__name__}: {_line(error)}); no file of the model"
            " was changed there; the same command sends what is missing"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{name}: the hub refuses it: {_line(error)}") from None


def _line(error: object) -> str:
    return " ".join(str(error).split())
