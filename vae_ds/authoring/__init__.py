"""Write a recipe for a base model and a corpus, with the reason for each number.

Depends on `data`, `model`, `config` and `errors`.
"""

from vae_ds.authoring.drafting import Wishes, draft

__all__ = ["Wishes", "draft"]
