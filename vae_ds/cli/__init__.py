"""The command line. Its modules import no slow package at the top, so that `vae-ds --help` answers within a second."""

from vae_ds.cli.entry import main, parser, run

__all__ = ["main", "parser", "run"]
