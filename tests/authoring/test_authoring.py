"""New recipes: the numbers follow from the base and the text, and the file is a recipe that trains."""

import re
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from support import ROOT
from support.tiny import ENGLISH, base, write_splits
from vae_ds import config as configuration
from vae_ds.authoring import Wishes, draft, drafting, rules
from vae_ds.config import DataConfig, RunConfig
from vae_ds.config.settings import BatchConfig
from vae_ds.data import corpora, sample_train
from vae_ds.errors import ConfigError, DataError
from vae_ds.model import base_shapes

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sentences of very different lengths: the number of repetitions is the number of the line, modulo 20."""
    train = [" ".join([ENGLISH[n % 256]] * (1 + n % 20)) for n in range(2000)]
    return write_splits(tmp_path / "my text", train, ENGLISH[256:320], ENGLISH[320:])


def recipe(written: str, folder: Path) -> RunConfig:
    """The recipe as `vae-ds train` reads it."""
    path = folder / "mine.yaml"
    path.write_text(written, encoding="utf-8")
    return configuration.load(RunConfig, str(path))


def test_the_structure_is_that_of_recommended(text: Path, tmp_path: Path) -> None:
    """For the tiny T5, all that was measured with it is in the recipe, the learning rate too."""
    made = recipe(draft(Wishes(base="tiny", data=str(text), percentile=50)), tmp_path)
    measured = configuration.load(RunConfig, "recommended")
    assert made.model == measured.model
    # `recommended` keeps the buckets that it was measured with. The default pads less.
    assert made.batch == measured.batch.model_copy(
        update={"bucket_batches": BatchConfig.model_fields["bucket_batches"].default}
    )
    assert made.deepspeed == measured.deepspeed
    assert made.evaluation == measured.evaluation
    (mine,), (theirs,) = made.phases, measured.phases
    for name in ("beta", "free_bits", "optimizer", "freeze"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.learning_rate.schedule == theirs.learning_rate.schedule


@pytest.mark.parametrize("percentile", [50, 99, 100])
def test_the_percentiles_are_those_of_the_text(text: Path, tmp_path: Path, percentile: float) -> None:
    """Against the tokenizer of transformers and sorted lengths. The sample is the whole text."""
    told = draft(Wishes(base=base(), data=str(text), percentile=percentile))
    tokenizer = AutoTokenizer.from_pretrained(base())
    lengths = sorted(len(tokenizer(line)["input_ids"]) for line in (text / "train.txt").read_text().splitlines())
    needed = lengths[ceil(len(lengths) * percentile / 100) - 1]
    assert recipe(told, tmp_path).data.max_tokens == 8 * ceil(needed / 8)
    said = " ".join(re.sub(r"\n *#", " ", told).split())
    for percent in (50, 90, 95, 99):
        assert f"{percent} %: {lengths[ceil(len(lengths) * percent / 100) - 1]}," in said
    assert f"longest: {lengths[-1]}." in said
    assert f"{percentile} % have at most {needed} tokens" in said


def test_a_sample_of_the_prepared_text_is_random_and_bounded(tmp_path: Path) -> None:
    text = write_splits(tmp_path / "text", [f"sentence {n}" for n in range(2000)], ENGLISH[:9], ENGLISH[9:20])
    data = DataConfig(corpus="text", path=str(text))
    corpus = corpora.load(data)
    sample = sample_train(data, corpus, 500)
    everything = (text / "train.txt").read_text().splitlines()
    assert len(sample.texts) == 500
    assert sample.sentences == 2000
    assert sample.is_exact
    # The first rows would have a mean place of 250; the standard error is 26.
    assert 900 < np.mean([everything.index(line) for line in sample.texts]) < 1100
    assert sample.texts == sample_train(data, corpus, 500).texts
    assert sorted(sample_train(data, corpus, 5000).texts) == sorted(everything)


def test_a_stream_is_counted_by_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file is estimated within a few percent, and only one window of it is read."""
    folder = write_splits(tmp_path / "text", ENGLISH * 400, ENGLISH[:50], ENGLISH[50:100])
    data = DataConfig(corpus="text", path=str(folder), streaming=True)
    exact = sample_train(data, corpora.load(data), 300)
    assert (exact.sentences, exact.is_exact, len(exact.texts)) == (160_000, True, 300)
    monkeypatch.setattr("vae_ds.data.corpora.stream.WINDOW_BLOCKS", 16)
    sample = sample_train(data, corpora.load(data), 300)
    assert not sample.is_exact
    assert sample.sentences == pytest.approx(160_000, rel=0.05)
    written = draft(Wishes(base=base(), data=str(folder), streaming=True, batch=100))
    made = recipe(written, tmp_path)
    assert made.data.streaming
    assert made.phases[0].epochs is None
    # 1,600 steps per epoch, so two epochs; the estimate has three digits.
    assert made.phases[0].steps == pytest.approx(3200, rel=0.05)
    assert len(str(made.phases[0].steps).rstrip("0")) <= 3


def test_a_stream_is_not_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_splits(tmp_path / "text", ENGLISH * 100, ENGLISH[:50], ENGLISH[50:100])
    hashed: list[Path] = []
    original = corpora.stream.noted_hash
    monkeypatch.setattr(corpora.stream, "noted_hash", lambda path, *rest: hashed.append(path) or original(path, *rest))
    draft(Wishes(base=base(), data=str(folder), streaming=True))
    assert hashed == []
    assert not any("train" in str(path) for path in (tmp_path / "text").parent.glob("**/*.arrow"))


def test_the_wishes_are_in_the_recipe(text: Path, tmp_path: Path) -> None:
    wishes = Wishes(
        base=base("v1_1"),
        data=str(text),
        latent_dim=8,
        kl_nats=6,
        epochs=2.5,
        batch=50,
        settings=["data.blank_lines=error", f"data.cache_dir={tmp_path / 'a cache'}"],
    )
    made = recipe(draft(wishes), tmp_path)
    assert made.model.latent_dim == 8
    assert made.phases[0].free_bits.nats == 6
    assert made.phases[0].epochs == 2.5
    assert made.batch.global_size == 50
    assert made.data.blank_lines == "error"
    assert made.data.cache_dir == str(tmp_path / "a cache")
    assert made.data.path == str(text)
    assert made.validation.sentences == 64
    assert made.validation.every_steps == made.checkpoint.every_steps == 10


def test_a_changed_number_of_units_keeps_the_kl(text: Path, tmp_path: Path) -> None:
    made = recipe(draft(Wishes(base=base(), data=str(text), latent_dim=16)), tmp_path)
    assert made.phases[0].free_bits.nats == 17.5


def test_each_derived_number_has_its_reason(text: Path) -> None:
    """The line above each number that depends on the base, the text or a rule is a comment that says which."""
    lines = draft(Wishes(base=base(), data=str(text))).splitlines()
    keys = ("base", "latent_dim", "gradient_checkpointing", "max_tokens", "global", "precision", "deepspeed", "epochs")
    keys += ("free_bits", "optimizer", "learning_rate", "every_steps", "sentences", "every", "export")
    for key in keys:
        at = next(index for index, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        above = at - 1
        while lines[above].strip().startswith("#") and "[" not in lines[above]:
            above -= 1
        assert re.search(r"# \[(measured|rule|data|base|chosen)\]", lines[above]), key
    assert all(len(line) <= 120 for line in lines if str(text) not in line and base() not in line)


@pytest.mark.parametrize("name", ["wéird: #näme\u2028", "1e5", "no", "🙂 ' \""])
def test_a_strange_name_stays_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_splits(tmp_path / name, ENGLISH[:200], ENGLISH[200:300], ENGLISH[300:])
    monkeypatch.chdir(tmp_path)
    assert (
        recipe(draft(Wishes(base=base(), data=name, latent_dim=16), f"vae-ds --data {name}"), tmp_path).data.path
        == name
    )


# The rules


def test_at_least_the_percentage_is_kept_whole() -> None:
    """Not a length between two sentences: 99 % of ten sentences are ten sentences."""
    lengths = np.arange(21, 31)
    assert [rules.length_at(lengths, percentile) for percentile in (50, 51, 90, 91, 99, 100)] == [
        25,
        26,
        29,
        30,
        30,
        30,
    ]
    assert [rules.max_tokens(lengths, percentile) for percentile in (10, 40, 41)] == [24, 24, 32]


def test_the_anchor_is_the_shipped_base() -> None:
    sizes = {name: prod(shape) for name, shape in base_shapes("tiny").items()}
    assert sum(sizes.values()) - sizes["shared.weight"] == rules.ANCHOR_PARAMETERS


def test_an_untied_head_is_not_counted(text: Path) -> None:
    """T5 v1.1 has a head of its own, which is as large as the embeddings. The rule for the rate leaves both out."""
    shapes = base_shapes(base("v1_1"))
    assert shapes["lm_head.weight"] == shapes["shared.weight"]
    assert "lm_head.weight" not in base_shapes(base("t5"))
    body = sum(prod(shape) for name, shape in shapes.items() if name not in ("lm_head.weight", "shared.weight"))
    said = " ".join(re.sub(r"\n *#", " ", draft(Wishes(base=base("v1_1"), data=str(text)))).split())
    assert f"this base has {body / 1e6:.2f} million" in said


@pytest.mark.parametrize(
    ("millions", "rate"), [(1.84, 2e-3), (0.1, 2e-3), (44.06, 4.1e-4), (198.2, 1.9e-4), (704.8, 1e-4), (2818.7, 5.1e-5)]
)
def test_the_rate_falls_with_the_square_root_of_the_size(millions: float, rate: float) -> None:
    """The values of docs/recipes.md, for T5's sizes without embeddings."""
    assert rules.learning_rate(round(millions * 1e6), 2e-3) == rate


def test_the_configuration_is_that_of_the_table() -> None:
    """Each cell of the first table in ds_configs/README.md, the memory too."""
    text = (ROOT / "ds_configs/README.md").read_text()
    rows = re.findall(r"^\| t5-\w+, ([\d,]+) M \| (\d+) \| (`.+) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    for millions, gpus, cells in rows:
        for cell, memory in zip(cells.split("|"), (16, 24, 40, 80), strict=True):
            name, size = cell.split()
            found, needed = rules.deepspeed(int(millions.replace(",", "")) * 10**6, int(gpus), memory)
            assert (f"`{found}`", f"{needed:.1f}") == (name, size), (millions, gpus, memory)


@pytest.mark.parametrize(
    ("sentences", "ranks", "size"),
    [(40_000, 1, 32), (3_200_000, 1, 32), (3_200_001, 1, 64), (10**8, 64, 512), (10**8, 6, 516), (10**4, 64, 64)],
)
def test_the_batch_grows_with_the_text(sentences: int, ranks: int, size: int) -> None:
    assert rules.global_batch(sentences, ranks) == size


def test_the_intervals_follow_the_steps() -> None:
    assert [rules.every_steps(steps) for steps in (1, 99, 2600, 3756, 31_250, 10**6)] == [1, 9, 260, 370, 3100, 5000]
    assert [rules.logged_every(steps) for steps in (1, 2600, 10**6)] == [1, 10, 100]
    assert [rules.warmup_steps(steps) for steps in (10, 2600, 10**6)] == [0, 52, 1000]
    assert [rules.epochs(steps) for steps in (1, 1313, 2600, 10**6)] == [10, 2, 1, 1]


# Sources


def named(source: Path | str, **options: Any) -> dict[str, Any]:
    return corpora.named(str(source), **options)


def test_a_source_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = write_splits(tmp_path / "three", ENGLISH[:10], ENGLISH[10:20], ENGLISH[20:30])
    assert named(three) == {"corpus": "text", "path": str(three)}
    assert named(three, column="body") == {"corpus": "text", "path": str(three), "column": "body"}
    drawn = {"valid": 0.05, "test": 0.05, "seed": 0}
    file = three / "train.txt"
    assert named(file) == {"corpus": "text", "path": str(file), "split": drawn}
    (tmp_path / "one").mkdir()
    file.rename(tmp_path / "one" / "train.txt")
    assert named(tmp_path / "one") == {"corpus": "text", "path": str(tmp_path / "one"), "split": drawn}
    (tmp_path / "one" / "train.txt").write_text("a sentence .\n" * 700_000)
    assert named(tmp_path / "one")["split"] == {"valid": 2000, "test": 2000, "seed": 0}
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    assert named(tmp_path / "saved")["corpus"] == "dataset"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb").mkdir()
    assert named("ptb") == {"corpus": "ptb"}
    assert named("./ptb") == {"corpus": "text", "path": "./ptb"}
    assert named("owner/set", column="body") == {"corpus": "dataset", "path": "owner/set", "column": "body"}


def test_a_data_set_on_disk_is_a_source(tmp_path: Path) -> None:
    import datasets

    parts = {"train": ENGLISH[:200], "validation": ENGLISH[200:260], "test": ENGLISH[260:]}
    rows = {name: datasets.Dataset.from_dict({"body": list(part)}) for name, part in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))
    made = recipe(draft(Wishes(base=base(), data=str(tmp_path / "saved"), column="body", latent_dim=16)), tmp_path)
    assert (made.data.corpus, made.data.column, made.validation.sentences) == ("dataset", "body", 60)


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    for source in ("nothing-here", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match=r"no such file or directory, and no corpus of this name; give a directory"):
            named(source)
    with pytest.raises(DataError, match="no such file or directory"):
        named(tmp_path / "nothing", column="text")
    (tmp_path / "text.txt").write_text("a\n")
    with pytest.raises(DataError, match="leave out --streaming"):
        named(tmp_path / "text.txt", streaming=True)


def test_a_recipe_that_cannot_be_is_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match="use at most 32"):
        draft(Wishes(base=base(), data=str(text), latent_dim=33))
    with pytest.raises(ConfigError, match="takes settings of the section `data`"):
        draft(Wishes(base=base(), data=str(text), settings=["model.dropout=0"]))
    with pytest.raises(ConfigError, match=r"unknown key `data.colum`.*did you mean"):
        draft(Wishes(base=base(), data=str(text), settings=["data.colum=x"]))
    with pytest.raises(ConfigError, match=r"--epochs 0.0001: .* less than one step"):
        draft(Wishes(base=base(), data=str(text), epochs=0.0001))
    with pytest.raises(DataError, match=r"only 2000 sentences; reduce batch\.global"):
        draft(Wishes(base=base(), data=str(text), batch=4000))
    (text / "train.txt").write_text("one sentence .\n" * 79)
    with pytest.raises(DataError, match="has 79 sentences; the prior of 8 latent units needs 80"):
        draft(Wishes(base=base(), data=str(text), latent_dim=8))
    (text / "valid.txt").write_text("one sentence .\n")
    with pytest.raises(DataError, match="the valid split has 1 sentences; a validation needs at least 2"):
        draft(Wishes(base=base(), data=str(text)))


def test_the_sample_is_bounded(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "SAMPLED", 100)
    assert "a random sample of 100 of 2,000 training" in " ".join(draft(Wishes(base=base(), data=str(text))).split())


def test_the_recipe_is_plain_yaml(text: Path) -> None:
    assert yaml.safe_load(draft(Wishes(base=base(), data=str(text))))["model"]["base"] == base()
