"""Do in a new process what `python WORDS` does. It imports nothing that reads variables of the environment."""

import atexit
import os
import runpy
import sys
import tempfile
from pathlib import Path


def run_python(words: list[str], log: Path, environment: dict[str, str], cwd: Path) -> None:
    """Run a script, `-m` and a module, or `-c` and code, in a new session, with the output in `log`."""
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # computed anew from TMPDIR
    option, *rest = words
    try:
        if option == "-c":
            sys.argv, sys.path = ["-c", *rest[1:]], ["", *sys.path]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif option == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = words, [str(Path(option).parent), *sys.path]
            runpy.run_path(option, run_name="__main__")
    finally:
        # multiprocessing ends a process without them.
        atexit._run_exitfuncs()
