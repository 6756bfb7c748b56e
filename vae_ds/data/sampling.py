"""A bounded random sample of the training sentences, without a pass over all of them.

Shapes: N sentences of the split, S sentences of the sample.
"""

from dataclasses import dataclass

from vae_ds.config import DataConfig
from vae_ds.data import corpora
from vae_ds.distributed import stream


@dataclass(frozen=True)
class Sample:
    """Training sentences, drawn at random without replacement.

    sentences: N, the size of the split.
    is_exact: False if N is an estimate, because the text is read as a stream.
    """

    texts: list[str]
    sentences: int
    is_exact: bool


def sample_train(data: DataConfig, corpus: corpora.Corpus, size: int, seed: int = 0) -> Sample:
    """At most `size` sentences of the training split of `corpus`, which was loaded with the settings `data`.

    Of a prepared corpus, only the sampled rows are read. Of a stream, one window is read: blocks of the file from
    random places. N is then the number of its lines times the share of the file that was read.

    Raises DataError like `LineStream.window`.
    """
    random = stream(seed, "sample")
    if not data.streaming:
        train = corpus.splits["train"]
        total = len(train)
        rows = sorted(random.choice(total, min(size, total), replace=False, shuffle=False).tolist())
        parts = train.select(rows).iter(10_000)
        return Sample([text for part in parts for text in part["text"]], total, is_exact=True)
    # No fingerprint: it would read the whole file, or a part of each ten megabytes.
    lines = corpora.open_stream(data, fingerprint="")
    found = lines.window(0, seed, 0).sentences
    blocks_read = -(-lines.blocks // lines.windows)
    total = round(len(found) * lines.blocks / blocks_read)
    chosen = sorted(random.choice(len(found), min(size, len(found)), replace=False, shuffle=False).tolist())
    return Sample([found[index] for index in chosen], total, is_exact=blocks_read == lines.blocks)
