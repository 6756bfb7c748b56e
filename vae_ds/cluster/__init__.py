"""Machines and jobs: the doctor that checks a machine or a job's nodes, and the submission of SLURM jobs.

Stands on `engine`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.cluster import doctor, submission

__all__ = ["doctor", "submission"]
