"""The command line: `vae-ds COMMAND ...`, `python -m vae_ds COMMAND ...`, `deepspeed --module vae_ds COMMAND ...`.

Exit codes: 0 done; 2 the user's input is wrong; 1 a fault; 75 stopped on request, the same command resumes.
Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vae_ds.cli import bench, cluster, evaluation, latents, recipes, studies, train
from vae_ds.errors import Failed, Stopped, UserError
from vae_ds.runtime import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, note_exit, own_rank

WAIT_FOR_RANK0_S = 10.0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, run, and leave with the documented exit code."""
    code = run(list(sys.argv[1:] if argv is None else argv))
    note_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if _distributed():
        # A native thread of the collective library can abort an interpreter that ends in the ordinary way,
        # and that would hide the exit code.
        os._exit(code)
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The parser of `vae-ds`. In the parsed arguments, `command` is the function that takes them."""
    whole = argparse.ArgumentParser(
        prog="vae-ds", description="Turn a pretrained T5 into a text variational autoencoder by finetuning alone."
    )
    subparsers = whole.add_subparsers(required=True, metavar="COMMAND")
    for family in (train, evaluation, latents, studies, cluster, bench, recipes):
        family.add(subparsers)
    return whole


def run(words: Sequence[str]) -> int:
    """Run one command in this process and return its exit code; wrong arguments raise SystemExit(2)."""
    # DeepSpeed's launcher puts --local_rank=N in front; the environment says the same.
    arguments = parser().parse_args([word for word in words if not word.startswith("--local_rank")])
    try:
        arguments.command(arguments)
    except UserError as error:
        _say_last(f"error: {error}")
        return EXIT_USER
    except BrokenPipeError:
        # The reader, such as `head`, has enough; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _say_last("interrupted")
        return EXIT_STOPPED
    except Stopped as stop:
        _say(str(stop))
        _leave()
        return EXIT_STOPPED
    except Failed as error:
        _say_last(f"error: {error}")
        _note_failure(arguments, error)
        return EXIT_FAULT
    except Exception as error:
        traceback.print_exc()
        _note_failure(arguments, error)
        return EXIT_FAULT
    _leave()
    return 0


def _distributed() -> bool:
    # Asked for only where a command has imported it: torch takes seconds to load.
    torch_distributed = sys.modules.get("torch.distributed")
    return torch_distributed is not None and bool(torch_distributed.is_initialized())


def _leave() -> None:
    """Wait for all ranks, where there are some; only where each comes here."""
    if _distributed():
        from vae_ds import distributed

        distributed.part()


def _say(message: str) -> None:
    """Print on rank 0."""
    if own_rank() == "0":
        print(message, file=sys.stderr, flush=True)


def _say_last(message: str) -> None:
    """Print on rank 0. The others wait for it: the launcher ends all when one ends, the message must come first."""
    _say(message)
    if own_rank() != "0":
        time.sleep(WAIT_FOR_RANK0_S)


def _note_failure(arguments: argparse.Namespace, error: Exception) -> None:
    run_dir = getattr(arguments, "run_dir", None)
    if run_dir and Path(run_dir, "config.yaml").is_file():
        from vae_ds.runtime import records

        # On a full disk that is what failed, and there is no place to tell it.
        with suppress(OSError):
            records.write_status(Path(run_dir), "failed", reason=f"{type(error).__name__}: {error}")
