"""Pretrain a small T5 from scratch: vocabulary, span corruption and language-model examples, training, model card.

Depends on `training`, `engine`, `data`, `model`, `distributed`, `runtime` and `config`.
"""

from vae_ds.pretraining.pretrainer import pretrain

__all__ = ["pretrain"]
