"""The command line. Its modules import nothing heavy at the top, so that `vae-ds --help` answers at once."""

from vae_ds.cli.entry import main, parser, run

__all__ = ["main", "parser", "run"]
