"""Each rank decodes its own sentence with a model that ZeRO 3 divides: `partitioned_decoding.py EXPORT OUT`."""

import json
import sys
from pathlib import Path

from vae_ds import distributed
from vae_ds.config.settings import OptimizerConfig
from vae_ds.engine import PhaseEngine, resolve
from vae_ds.latents import reconstruct
from vae_ds.model import T5VAE, load_tokenizer


def main(export: str, out: Path, texts: list[str]) -> None:
    ranks = distributed.start()
    tree = resolve("zero3", "fp32")
    model = T5VAE.from_pretrained(export)
    # DeepSpeed does not partition parameters of up to this size. Partition the embeddings alone: on busy cores, the
    # collectives of all parameters take minutes.
    tree["zero_optimization"]["stage3_param_persistence_threshold"] = model.t5.shared.weight.numel() - 1
    engine = PhaseEngine(
        model, optimizer=OptimizerConfig(), ranks=ranks,
        precision="fp32", ds_config=tree,
    )  # fmt: skip
    tokenizer = load_tokenizer(export)
    made = [
        reconstruct(engine.module, tokenizer, [texts[ranks.rank]], max_new_tokens=40, beams=beams) for beams in (1, 2)
    ]
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(made))
    engine.close()
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
