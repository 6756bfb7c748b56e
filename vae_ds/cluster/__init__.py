"""Machines and jobs: checks of a machine or of the nodes of a job, and the submission of SLURM jobs.

Imports `engine`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.cluster import doctor, submission

__all__ = ["doctor", "submission"]
