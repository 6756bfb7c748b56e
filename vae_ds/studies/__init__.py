"""Studies of many runs: plans, training, tables, figures and reports.

Depends on `training`, `evaluation`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.studies import report, study
from vae_ds.studies.metric_tables import print_metrics, with_differences

__all__ = ["print_metrics", "report", "study", "with_differences"]
