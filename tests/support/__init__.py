"""Helpers for several tests: small bases and texts, real processes and ranks, a SLURM cluster on one machine."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
