"""The `data` section of a recipe, and the base of every settings class."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPLITS = ("train", "valid", "test")


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values are frozen, defaults are validated too."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, validate_default=True)


class SplitConfig(Settings):
    """Sizes of the validation and test splits that are drawn from one file: numbers, or fractions below 1."""

    valid: float = Field(
        2000, gt=0, description="text: sentences to draw as valid from one file, or a fraction below 1"
    )
    test: float = Field(2000, gt=0, description="text: sentences to draw as test from one file, or a fraction below 1")
    seed: int = Field(0, ge=0, description="text: random seed of this draw")

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        sizes = (self.valid, self.test)
        if any(size > 1 and size % 1 for size in sizes) or sum(size for size in sizes if size < 1) >= 1:
            raise ValueError(f"`valid` and `test` are integers, or fractions with a sum below 1; found {sizes}")
        return self


class DataConfig(Settings):
    """The source of the text, and the maximum length of a sentence."""

    corpus: Literal["docstrings", "wordnet", "grammar", "text", "dataset", "ptb", "snli", "yahoo", "yelp"] = Field(
        "docstrings", description="the kind of source"
    )
    path: str | None = Field(
        None,
        description="text: a directory with train.txt, valid.txt and test.txt; dataset: a hub name or a directory;"
        " ptb, snli, yahoo, yelp: a directory of either kind, null: the hub; wordnet: a directory with data.noun, ...",
    )
    train: str | None = Field(
        None, description="text: the training file, or a pattern such as parts/*.txt, if it is not in `path`"
    )
    valid: str | None = Field(None, description="text: the validation file or a pattern, if it is not in `path`")
    test: str | None = Field(None, description="text: the test file or a pattern, if it is not in `path`")
    split: SplitConfig | None = Field(
        None, description="text: draw valid and test from the one file of `path` or `train`; null: three files"
    )
    subset: str | None = Field(None, description="dataset: the name of its configuration on the hub")
    revision: str | None = Field(None, description="dataset: a branch, tag or commit on the hub; null: the newest")
    splits: dict[str, str] = Field(
        {"train": "train", "valid": "validation", "test": "test"}, description="dataset: the names that its splits have"
    )
    column: str = Field(
        "text", description="dataset, and text in .csv, .tsv, .jsonl or .parquet files: the column with the text"
    )
    label_column: str | None = Field(
        None,
        description="dataset, and text with columns: the column with a label, which probes and maps use; null: none",
    )
    labelled: bool = Field(
        False, description="text: each line is a label, a tab, and the text; probes and maps use the label"
    )
    blank_lines: Literal["skip", "error"] = Field("skip", description="lines and rows without text")
    bad_lines: Literal["skip", "error"] = Field(
        "skip", description="streaming: lines that cannot be read (with `skip`, many of them are still an error)"
    )
    examples: bool = Field(False, description="wordnet: also use the example sentences of the definitions")
    sentences: dict[str, int] = Field(
        {"train": 40_000, "valid": 2_000, "test": 2_000}, description="grammar: number of sentences in each split"
    )
    seed: int = Field(0, ge=0, description="grammar: random seed of the sentences")
    limit: int | None = Field(None, ge=1, description="use only the first N sentences of each split")
    streaming: bool = Field(
        False, description="text: read the training file during the training, without preparing it before"
    )
    max_tokens: int = Field(
        64, ge=2, description="maximum sentence length in subword tokens, with the end-of-sentence token"
    )
    cache_dir: str | None = Field(None, description="cache directory; null: $VAE_DS_CACHE, else ~/.cache/vae_ds")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.corpus == "text" and not (self.path or (self.train and (self.split or (self.valid and self.test)))):
            raise ValueError(
                "corpus `text` needs `path`, or all of `train`, `valid` and `test`, or `train` and `split`"
            )
        if self.split and self.corpus != "text":
            raise ValueError(
                f"`split` draws from a file of corpus `text`, not `{self.corpus}`; for `dataset`, set `splits` to"
                " slices such as train[95%:]"
            )
        if self.split and (self.valid or self.test):
            raise ValueError("`split` draws valid and test; remove `valid` and `test`, or `split`")
        if self.split and self.streaming:
            raise ValueError("`split` reads the whole file, but `streaming` does not; remove one of the two")
        if self.corpus == "dataset" and not self.path:
            raise ValueError("corpus `dataset` needs `path`: a hub name or a directory")
        if self.streaming and self.limit is not None:
            raise ValueError("`limit` counts sentences, but `streaming` does not count them; remove one of the two")
        if self.label_column is not None and self.corpus in ("docstrings", "wordnet", "grammar"):
            raise ValueError(f"corpus `{self.corpus}` has no label column; remove `label_column`")
        if set(self.splits) - set(SPLITS):
            raise ValueError(f"`splits` may have only the keys {', '.join(SPLITS)}; found {', '.join(self.splits)}")
        if set(self.sentences) - set(SPLITS) or min(self.sentences.values(), default=1) < 1:
            raise ValueError(f"`sentences` maps {', '.join(SPLITS)} to numbers of at least 1; found {self.sentences}")
        return self
