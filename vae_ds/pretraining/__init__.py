"""A small T5 from nothing: vocabulary, span corruption and language-model examples, the training, the model card.

Stands on `training`, `engine`, `data`, `distributed`, `runtime` and `config`.
"""

from vae_ds.pretraining.pretrainer import pretrain

__all__ = ["pretrain"]
