"""The command line: `vae-ds COMMAND ...`, `python -m vae_ds COMMAND ...`, `deepspeed --module vae_ds COMMAND ...`.

Exit codes: 0 done; 1 a fault; 2 wrong input; 69 another rank or its machine is gone; 75 stopped on request. After 69
and 75 the same command resumes. The commands import slow packages inside their functions, so that `--help` answers
within a second.
"""

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from vae_ds import __version__
from vae_ds.cli import (
    bench,
    cluster,
    codes,
    evaluation,
    inspection,
    latents,
    prior,
    recipes,
    sharing,
    status,
    studies,
    train,
)
from vae_ds.errors import Failed, Lost, OutOfMemory, Stopped, UserError
from vae_ds.runtime import EXIT_FAULT, EXIT_LOST, EXIT_STOPPED, EXIT_USER, note_exit, own_rank

WAIT_FOR_RANK0_S = 10.0
# DeepSpeed's launcher looks at its ranks once a second, in no order.
WAIT_FOR_CAUSE_S = 3.0
EPILOG = """\
`vae-ds COMMAND --help` lists the options of a command.

Exit codes:
  0   done
  1   a fault
  2   wrong input
  69  another rank or its machine is gone; the same command resumes
  75  stopped on request; the same command resumes
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the arguments, run the command, and exit with the documented exit code."""
    _show_messages()
    code = run(list(sys.argv[1:] if argv is None else argv))
    note_exit(code)
    _tell_torchrun(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if _distributed():
        # A native thread of the collective library can abort an interpreter that ends normally. That would hide the
        # exit code.
        os._exit(code)
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The parser of `vae-ds`. The attribute `command` of the parsed arguments is the function to call with them."""
    top = argparse.ArgumentParser(
        prog="vae-ds",
        description="Turn a pretrained T5 into a text variational autoencoder by finetuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vae_ds {__version__}")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    every = (train, status, evaluation, prior, latents, codes, inspection, sharing, studies, cluster, bench, recipes)
    for family in every:
        family.add(subparsers)
    return top


def run(words: Sequence[str]) -> int:
    """Run one command in this process and return its exit code. Wrong arguments raise SystemExit(2)."""
    top = parser()
    if "_ARGCOMPLETE" in os.environ:
        _complete(top)
    # DeepSpeed's launcher adds --local_rank=N in front. The environment contains the same number.
    arguments = top.parse_args([word for word in words if not word.startswith("--local_rank")])
    streams = sys.stdout, sys.stderr
    try:
        return _run(arguments)
    finally:
        # A command may have replaced the streams (`outlive_terminal`).
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = streams


def _show_messages() -> None:
    """Show the messages of the package, such as the limits that `auto` has found. Python shows warnings only."""
    logging.getLogger("vae_ds").setLevel(logging.INFO)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.INFO)


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.command(arguments)
        # Here, so that a closed pipe is met below.
        sys.stdout.flush()
    except UserError as error:
        _print_before_exit(f"error: {error}")
        _record_end(arguments, "failed", str(error), EXIT_USER, only_if_running=True)
        return EXIT_USER
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe of a command that only prints: a command that works goes on
        # without its terminal (`outlive_terminal`). The buffered output must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        # The libraries' destructors would complain of what they find at exit.
        sys.unraisablehook = lambda _: None
        _print_before_exit("interrupted")
        reason = "interrupted; the steps since the last checkpoint are lost"
        _record_end(arguments, "stopped", reason, EXIT_STOPPED)
        return EXIT_STOPPED
    except Stopped as stop:
        _print_on_rank0(str(stop))
        _leave_group()
        return EXIT_STOPPED
    except Lost as error:
        print(f"error: rank {own_rank()}: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST
    except OutOfMemory as error:
        # Any rank can be the one that has too little memory.
        print(f"error: rank {own_rank()}: {error}", file=sys.stderr, flush=True)
        _record_end(arguments, "failed", f"{type(error).__name__}: {error}", EXIT_FAULT)
        return EXIT_FAULT
    except Failed as error:
        _print_before_exit(f"error: {error}")
        _record_end(arguments, "failed", f"{type(error).__name__}: {error}", EXIT_FAULT)
        return EXIT_FAULT
    except Exception as error:
        traceback.print_exc()
        code = _code_of(error)
        _record_end(arguments, "failed", f"{type(error).__name__}: {error}", code)
        _let_the_cause_end_first(error)
        return code
    _leave_group()
    return 0


def _complete(top: argparse.ArgumentParser) -> None:
    """Answer the shell, which asks for completions, and exit. Does nothing without argcomplete."""
    with suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(top)


def _distributed() -> bool:
    # Do not import torch for this question: it takes seconds to load.
    torch_distributed = sys.modules.get("torch.distributed")
    return torch_distributed is not None and bool(torch_distributed.is_initialized())


def _leave_group() -> None:
    """Wait for all ranks of a distributed run. Call it only where every rank calls it."""
    if _distributed():
        from vae_ds import distributed

        distributed.part()


def _code_of(error: Exception) -> int:
    if not _distributed():
        return EXIT_FAULT
    from vae_ds import distributed

    return EXIT_LOST if distributed.is_loss(error) else EXIT_FAULT


def _let_the_cause_end_first(error: Exception) -> None:
    """Wait, if the error is that of a rank whose peer has ended: a launcher takes the first end that it sees."""
    if _distributed():
        from vae_ds import distributed

        if distributed.is_consequence(error):
            time.sleep(WAIT_FOR_CAUSE_S)


def _tell_torchrun(code: int) -> None:
    """Leave the code for the ranks that torchrun may start next."""
    # What failed before torch was loaded fails as quickly again.
    if "torch.distributed" in sys.modules:
        from vae_ds import distributed

        # The agent may have ended first.
        with suppress(Lost):
            distributed.note_end(code)


def _print_on_rank0(message: str) -> None:
    """Print to standard error on rank 0."""
    if own_rank() == "0":
        print(message, file=sys.stderr, flush=True)


def _print_before_exit(message: str) -> None:
    """Print on rank 0. The other ranks wait for it, because the launcher ends all ranks as soon as one ends."""
    _print_on_rank0(message)
    if own_rank() != "0":
        time.sleep(WAIT_FOR_RANK0_S)


def _record_end(
    arguments: argparse.Namespace, state: str, reason: str, code: int, only_if_running: bool = False
) -> None:
    """Record how the run ended that the command trained. `only_if_running`: only if this process had started it."""
    run_dir = getattr(arguments, "trained_dir", None)
    if run_dir is None or not (run_dir / "config.yaml").is_file():
        return
    from vae_ds.runtime import records

    # On a full disk the status cannot be written either.
    with suppress(OSError, UserError):
        status = records.read_status(run_dir) if only_if_running else None
        if not only_if_running or (status and (status["state"], status["pid"]) == ("running", os.getpid())):
            records.write_end(run_dir, state, reason, code)
