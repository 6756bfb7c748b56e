"""Give an export to others: its model card, the Hugging Face hub, and the formats of other libraries.

Depends on `model`, `runtime`, `config` and `errors`.
"""

from vae_ds.sharing import encoder
from vae_ds.sharing.card import CARD, RECIPE, Examples, write_card
from vae_ds.sharing.hub_push import push

__all__ = ["CARD", "RECIPE", "Examples", "encoder", "push", "write_card"]
