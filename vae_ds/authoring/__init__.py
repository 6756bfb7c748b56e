"""Write a recipe for a base model and a corpus, with the reason for each number, and plan the memory of a run.

Depends on `training`, `data`, `model`, `engine`, `config` and `errors`.
"""

from vae_ds.authoring.drafting import Wishes, draft
from vae_ds.authoring.planning import Memory, Plan, memory, needs, plan, text

__all__ = ["Memory", "Plan", "Wishes", "draft", "memory", "needs", "plan", "text"]
