"""A training file read as a stream: every line once an epoch, no full pass, one run on any ranks and resumed."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from support.launch import job, launch, run_jobs
from support.processes import curve
from support.tiny import ENGLISH, base, make_base, write_splits
from vae_ds import cli
from vae_ds.config import DataConfig
from vae_ds.config.settings import BatchConfig
from vae_ds.data import Feed, cache, corpora, feed
from vae_ds.data.corpora import LineStream
from vae_ds.data.corpora import stream as stream_module
from vae_ds.errors import DataError
from vae_ds.model.t5vae import load_tokenizer


def opened(folder: Path, train: bytes, block_bytes: int = 64, window_blocks: int = 3, **data: Any) -> LineStream:
    """A stream of small blocks over a file with these bytes."""
    folder.mkdir(exist_ok=True)
    name = data.pop("name", "train.txt")
    for split in ("valid.txt", "test.txt"):
        (folder / split).write_text("a line\n", encoding="utf-8")
    (folder / name).write_bytes(train)
    made = corpora.open_stream(DataConfig(corpus="text", path=str(folder), streaming=True, **data))
    return replace(made, block_bytes=block_bytes, window_blocks=window_blocks)


def epoch(lines: LineStream, *keys: int) -> list[list[str]]:
    return [lines.window(number, 0, *keys).sentences for number in range(lines.windows)]


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n"])
def test_every_line_is_in_one_window(tmp_path: Path, block_bytes: int, end: bytes) -> None:
    """Lines that end where a block does, that are longer than blocks, and of many bytes a character."""
    lines = [*ENGLISH[:40], "é" * 90, "x", "ü", "y" * 63, "z" * 64, "last"]
    split = b"\r\n" if end == b"\r\n" else b"\n"
    stream = opened(tmp_path, split.join(line.encode() for line in lines) + end, block_bytes)
    assert sorted(line for window in epoch(stream, 0, 0) for line in window) == sorted(lines)


def test_an_epoch_is_shuffled_by_its_keys_alone(tmp_path: Path) -> None:
    stream = opened(tmp_path, "\n".join(ENGLISH).encode())
    assert stream.windows > 10
    one = epoch(stream, 0, 0)
    assert one == epoch(stream, 0, 0)
    orders = [one, epoch(stream, 0, 1), epoch(stream, 1, 0)]
    assert all(a != b for a, b in zip(orders, [*orders[1:], orders[0]], strict=True))
    # Of a window, lines come from all over the file.
    places = sorted(ENGLISH.index(line) for line in one[0])
    assert places[-1] - places[0] > len(ENGLISH) / 4


def test_a_byte_order_mark_labels_and_json_lines(tmp_path: Path) -> None:
    marked = opened(tmp_path / "a", b"\xef\xbb\xbf1\tone\n2\ttwo\n", labelled=True)
    assert epoch(marked, 0, 0) == [["one", "two"]]
    rows = "".join(json.dumps({"said": text, "more": 1}) + "\n" for text in ENGLISH[:9])
    (window,) = epoch(opened(tmp_path / "b", rows.encode(), 999, name="train.jsonl", column="said"), 0)
    assert sorted(window) == sorted(ENGLISH[:9])


@pytest.mark.parametrize(
    ("data", "train", "said"),
    [
        ({}, b"fine\nb\xffd\n", r"train\.txt, from byte:5: not UTF-8 at byte 2"),
        ({"labelled": True}, b"1\tone\ntwo\n", r"train\.txt, from byte:6: no tab"),
        ({}, b"", r"train\.txt: empty"),
        ({"name": "train.csv", "column": "text"}, b"text\na\n", r"train\.csv: data\.streaming reads plain text"),
        (
            {"name": "train.parquet"},
            b"PAR1",
            r"train\.parquet: data\.streaming reads plain text .*parquet has no lines",
        ),
        ({"name": "train.txt.gz"}, b"\x1f\x8b", r"train\.txt\.gz: data\.streaming seeks in the file, but a compressed"),
        ({"name": "train.jsonl.zst"}, b"(\xb5", r"train\.jsonl\.zst: data\.streaming seeks .* decompress it, or set"),
        ({}, "text\n".encode("utf-16"), r"train\.txt:1: not UTF-8 .* looks like UTF-16LE"),
        ({"blank_lines": "error"}, b"a\n\nb\n \n", r"train\.txt, from byte:2: a line without .* in all: 2, 5$"),
        ({"labelled": True}, b"one\n" * 12, r"from byte:0: no tab.*; 12 bad lines in all: 0, 4, .*, 36, \.\.\.$"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, data: dict[str, Any], train: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        epoch(opened(tmp_path, train, **{"bad_lines": "error"} | data), 0, 0)


BAD = [b"caf\xe9 au lait", b"a zero \0 byte"]


def with_bad(lines: Sequence[str], every: int, bad: Sequence[bytes] = BAD) -> bytes:
    """The lines as bytes, with a bad line after each `every` of them."""
    found = []
    for number, line in enumerate(lines, 1):
        found += [line.encode(), *([bad[number // every % len(bad)]] if number % every == 0 else [])]
    return b"\n".join(found) + b"\n"


@pytest.mark.parametrize("block_bytes", [64, 1000, 1 << 20])
def test_bad_lines_are_left_out_and_counted(tmp_path: Path, block_bytes: int) -> None:
    """Each once, wherever the blocks end; the other lines are all there."""
    train = with_bad(ENGLISH, every=40)
    lines = opened(tmp_path, train, block_bytes)
    windows = [lines.window(number, 0, 0) for number in range(lines.windows)]
    assert sorted(line for window in windows for line in window.sentences) == sorted(ENGLISH)
    assert sum(window.skipped.bad for window in windows) == len(ENGLISH) // 40
    places = [place for window in windows for place in window.skipped.first_bad]
    assert all(train[place:].startswith(tuple(BAD)) for place in places)
    # The strict setting names the first one of a window instead.
    bad = next(number for number, window in enumerate(windows) if window.skipped.bad)
    with pytest.raises(DataError, match=f"from byte:{windows[bad].skipped.first_bad[0]}: "):
        opened(tmp_path, train, block_bytes, bad_lines="error").window(bad, 0, 0)


def test_blank_lines_that_are_errors_are_bad_lines(tmp_path: Path) -> None:
    train, number = with_bad(ENGLISH, 40, [b"", b"  "]), len(ENGLISH) // 40
    for setting, bad in (("error", number), ("skip", 0)):
        found = opened(tmp_path, train, 1 << 20, blank_lines=setting).window(0, 0, 0)
        assert (found.skipped.bad, found.skipped.blank, len(found.sentences)) == (bad, number, len(ENGLISH))


@pytest.mark.parametrize(("bad", "total"), [(10, 80), (19, 200), (21, 200), (3, 3)])
def test_a_file_of_the_wrong_kind_is_refused_at_the_start(tmp_path: Path, bad: int, total: int) -> None:
    """Few bad lines, or few of many, are no reason; more than a tenth are, and so is a file without a good line."""
    text = [f"{number}\ta line" for number in range(total - bad)] + ["no label"] * bad
    opened(tmp_path, "\n".join(text).encode(), labelled=True)
    data = DataConfig(corpus="text", path=str(tmp_path), streaming=True, labelled=True)
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").write_text("1\ta line\n", encoding="utf-8")
    if (bad, total) in ((10, 80), (19, 200)):
        corpora.check(data)
        return
    said = rf"no tab; .*; {bad} of {total} lines in a sample of the file are bad, but data.bad_lines=skip allows 10%"
    with pytest.raises(DataError, match=said):
        corpora.check(data)


def test_one_bad_window_ends_the_run_with_one_line(tmp_path: Path) -> None:
    """The second half has another encoding."""
    text = "\n".join(["café au lait"] * 400)
    lines = opened(tmp_path, f"{text}\n".encode() + text.encode("latin-1"), 64, 10_000)
    with pytest.raises(DataError) as found:
        lines.window(0, 0, 0)
    said = (
        r".*train\.txt, from byte:\d+: not UTF-8 at byte 4 of the line; convert the file; 400 of 800 lines in window 1"
    )
    assert re.fullmatch(said + r" of 1 are bad, but data\.bad_lines=skip allows 10%; correct .*", str(found.value))


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LONGEST_LINE_BYTES", 2000)
    lines = opened(tmp_path, b"one\ntwo\n" + b"x" * 9000 + b"\nthree\n" + b"y" * 1999 + b"\n", 1000, 100)
    found = lines.window(0, 0, 0)
    assert sorted(found.sentences) == ["one", "three", "two", "y" * 1999]
    assert (found.skipped.bad, found.skipped.first_bad) == (1, [8])
    assert found.skipped.reason == "longer than 2,000 bytes; write one sentence per line"


def test_the_count_of_skipped_lines_is_told_and_does_not_count_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped anywhere and resumed, also at the border of two windows, it is that of the run that was never stopped."""
    lines = opened(tmp_path, with_bad(ENGLISH, every=20), 512, 8)
    tokenizer, batch = load_tokenizer(base()), BatchConfig(global_size=16, bucket_batches=2)

    def make(place: list[int], bad: int) -> Feed:
        return Feed(feed.Streamed(lines, tokenizer, max_tokens=9), batch, 0, 1, place, bad)

    place = [0, 0, 0]
    whole = make(place, 0)
    states = []
    while place[0] < 2:
        taken = whole.take()
        states.append(([*place], whole.bad_lines, whole.keys, taken.tolist()))
    assert whole.bad_lines == 2 * (len(ENGLISH) // 20)
    told = [record.getMessage() for record in caplog.records if "bad lines so far" in record.getMessage()]
    assert re.search(
        r"train\.txt, from byte \d+: (not UTF-8|a zero byte) .*; the run has skipped \d+ bad lines", told[0]
    )
    counts = [int(line.split("has skipped ")[1].split()[0]) for line in told]
    assert len(counts) > 2
    assert all(b >= 2 * a for a, b in pairwise(counts))
    for before, after in pairwise(states):
        resumed_place = [*before[0]]
        resumed = make(resumed_place, before[1])
        taken = resumed.take()
        assert (resumed_place, resumed.bad_lines, resumed.keys, taken.tolist()) == after


def test_a_pattern_of_many_files_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, b"one\n")
    data = DataConfig(corpus="text", path=str(tmp_path), train=f"{tmp_path}/t*.txt", streaming=True)
    with pytest.raises(DataError, match=r"data\.streaming seeks in one file, but this pattern matches 2 files; join"):
        corpora.check(data)


def test_blank_lines_are_skipped_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever they are in a block: as in a file that is read whole."""
    lines = [
        line for number in range(60) for line in (f"line {number}", *([""] * (number % 3)), *([" "] * (number % 2)))
    ]
    stream = opened(tmp_path, "\n".join(lines).encode(), window_blocks=2)
    found = [line for window in epoch(stream, 0) for line in window]
    assert sorted(found) == sorted(line for line in lines if line.strip())
    epoch(stream, 1)
    (record,) = [record for record in caplog.records if "without text" in record.getMessage()]
    assert "data.blank_lines=error refuses them" in record.getMessage()


def test_unknown_subwords_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = feed.Streamed(opened(tmp_path, "一丁 丂\n".encode() * 9, 1000), load_tokenizer(base()), max_tokens=9)
    for number in range(3):
        source.portion(0, seed=0, phase=0, epoch=number)
    assert caplog.text.count("are unknown to the tokenizer") == 1


def test_the_papers_corpora_in_optimus_layout(tmp_path: Path) -> None:
    opened(tmp_path, b"3\tgood food\n1\tbad\n")
    lines = corpora.open_stream(DataConfig(corpus="yelp", path=str(tmp_path), streaming=True))
    assert lines.window(0, 0, 0).sentences == ["good food", "bad"]


def test_what_is_cut_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = opened(tmp_path, b"a book\n" + b" ".join([b"book"] * 20) + b"\n", 1000)
    found = feed.Streamed(lines, load_tokenizer(base()), max_tokens=9).portion(0, seed=0, phase=1, epoch=2)
    assert (len(found.tokens), found.keys, found.bad) == (2, (1, 2, 0), 0)
    assert "train.txt, epoch 3, window 1 of 1: 1 of 2 sentences (50.00 %) are longer" in caplog.text


def test_what_cannot_be_a_stream_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_splits(tmp_path / "text", ENGLISH[:200], ENGLISH[200:210], ENGLISH[210:220])
    text = ["data.corpus=text", f"data.path={tmp_path / 'text'}", "data.streaming=true"]
    for settings, said in (
        (["data.corpus=grammar", "data.streaming=true"], "data.streaming needs text files; grammar has none"),
        ([*text, "data.limit=5"], "`limit` counts sentences"),
        ([*text, "phases.1={name: full, epochs: 1}"], "phases.1.epochs: data.streaming does not count the sentences"),
        (
            [*text, "phases.1.beta={schedule: linear, over_epochs: 2}"],
            "phases.1.beta.over_epochs: data.streaming does not count",
        ),
        ([*text, "batch.global=256", "phases.0.steps=1"], "batch.global is 256 but"),
    ):
        assert cli.run(["train", "demo", "--run-dir", str(tmp_path / "run"), "--set", *settings]) == 2
        assert said in capsys.readouterr().err


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    text = "\n".join(ENGLISH).encode()
    found = {
        opened(tmp_path, changed).fingerprint for changed in (text, text + b"\nmore", text.replace(b"the", b"teh"))
    }
    assert len(found) == 3
    assert opened(tmp_path, text).fingerprint in found
    assert opened(tmp_path, text, labelled=True).fingerprint not in found


def test_a_change_inside_a_file_changes_the_fingerprint(tmp_path: Path) -> None:
    """100 kB of 8 MB, of the same size; and a single byte. A copy is the same text."""
    text = bytearray("\n".join(ENGLISH * 999).encode()[:8_000_000])
    assert len(text) == 8_000_000
    found = []
    for change in (slice(0), slice(3_950_000, 4_050_000), slice(5_000_001, 5_000_002)):
        changed = bytearray(text)
        changed[change] = bytes(byte ^ 1 for byte in changed[change])
        found.append(opened(tmp_path, changed).fingerprint)
    assert len(set(found)) == 3
    assert opened(tmp_path / "copy", text).fingerprint == found[0]


def test_probes_notice_what_the_documentation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large file: any change of a distance between probes, a smaller one by (length + block) / distance."""
    monkeypatch.setattr(stream_module, "HASHED_BYTES", 1000)
    monkeypatch.setattr(stream_module, "PROBES", 50)
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 100)
    text = bytearray(b"abcdefghi\n" * 100_000)
    distance = (len(text) - 100) / 49
    before = opened(tmp_path, text).fingerprint

    def share(length: int, draws: int = 150) -> float:
        random, noticed = np.random.default_rng(length), 0
        for at in random.integers(0, len(text) - length, draws):
            changed = bytearray(text)
            changed[at : at + length] = changed[at : at + length].upper().replace(b"\n", b".")
            noticed += opened(tmp_path, changed).fingerprint != before
        return noticed / draws

    assert share(int(distance) + 1) == 1
    for length in (1000, 8000):
        expected = (length + 100) / distance
        assert share(length) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 150) ** 0.5)
    assert opened(tmp_path, text + b"x").fingerprint != before


@pytest.mark.parametrize("hashed", [1 << 30, 1000])
def test_a_large_file_is_read_once_for_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: int
) -> None:
    monkeypatch.setattr(cache, "_NOTED_BYTES", 1000)
    monkeypatch.setattr(cache, "_SETTLED_S", -1.0)
    monkeypatch.setattr(stream_module, "HASHED_BYTES", hashed)
    data = DataConfig(corpus="text", path=str(tmp_path), streaming=True, cache_dir=str(tmp_path / "cache"))
    opened(tmp_path, "\n".join(ENGLISH * 9).encode())
    first = corpora.open_stream(data).fingerprint
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) == 1
    kept[0].write_text("f" * 32)  # a note that is used shows
    second = corpora.open_stream(data).fingerprint
    assert second not in (first, opened(tmp_path, b"other text").fingerprint)
    # The ranks that are given the fingerprint do not need a note.
    kept[0].unlink()
    assert corpora.open_stream(data, "given").fingerprint == "given"
    assert not kept[0].exists()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 sentences in windows of a few blocks."""
    folder = tmp_path_factory.mktemp("streaming")
    made = make_base(folder / "base", "t5", num_layers=1, num_decoder_layers=1)
    text = write_splits(folder / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
name: streamed
model: {{base: {made}, latent_dim: 4, dropout: 0.1}}
data: {{corpus: text, path: {text}, streaming: true, max_tokens: 40, cache_dir: {folder / "cache"}}}
batch: {{global: 16, bucket_batches: 2}}
precision: fp32
phases:
  - {{name: warmup, steps: 9, freeze: [decoder], beta: {{schedule: constant, value: 0}}, denoise: 0.1}}
  - {{name: full, steps: 40, beta: {{schedule: linear, over_fraction: 0.5}}}}
validation: {{every_steps: 20, sentences: 20}}
checkpoint: {{every_steps: 1000, keep: 1}}
logging: {{every: 1, tensorboard: false, progress: false}}
evaluation: {{iw_samples: 2, samples: 0, bleu_sentences: 0}}
export: last
""",
        encoding="utf-8",
    )
    return path


def test_a_run_is_the_same_on_any_ranks_and_resumed(recipe: Path, tmp_path: Path) -> None:
    """More than an epoch, over several windows; stopped in the middle of one."""

    plain, small = "model.dropout=0", "import vae_ds.data.corpora.stream as s; s.BLOCK_BYTES, s.WINDOW_BLOCKS = 512, 8"
    two, one, whole, stopped = (tmp_path / name for name in ("two", "one", "whole", "stopped"))
    jobs = [job(recipe, two, plain), job(recipe, whole), job(recipe, stopped, stop_at=24), job(recipe, stopped)]
    run_jobs(2, jobs, tmp_path, before=small, timeout_s=200)
    run_jobs(1, [job(recipe, one, plain)], tmp_path, before=small, timeout_s=200)
    assert curve(stopped) == curve(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (stopped, whole))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    rows = curve(two)
    assert [row["step"] for row in rows] == list(range(1, 50))
    for a, b in zip(rows, curve(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    epochs = [row["epoch"] for row in rows if row["phase"] == "full"]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 1.5
    # The other splits are as ever; the training split is nowhere whole.
    assert cli.run(["evaluate", str(two)]) == 0
    assert cli.run(["reconstruct", str(two), "--from", "train"]) == 2


def test_bad_lines_do_not_end_a_run_and_are_counted_once(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, stopped inside an epoch and resumed: the count is that of one rank that was never stopped."""
    text = write_splits(tmp_path / "text", [], ENGLISH[300:350], ENGLISH[350:400])
    (text / "train.txt").write_bytes(with_bad(ENGLISH[:300], every=25))
    small = "import vae_ds.data.corpora.stream as s; s.BLOCK_BYTES, s.WINDOW_BLOCKS = 512, 8"
    settings = (f"data.path={text}", "model.dropout=0", "phases.1.steps=15", "validation.every_steps=100")
    one, two = tmp_path / "one", tmp_path / "two"
    run_jobs(2, [job(recipe, two, *settings, stop_at=14), job(recipe, two, *settings)], tmp_path, before=small)
    run_jobs(1, [job(recipe, one, *settings)], tmp_path, before=small)
    for a, b in zip(curve(two), curve(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    counts = {json.loads((run / "status.json").read_text())["bad_lines"] for run in (one, two)}
    assert len(counts) == 1
    assert 5 < counts.pop() <= 2 * 12
    capsys.readouterr()
    assert cli.run(["status", str(two)]) == 0
    assert re.search(r"bad lines +\d+ skipped", capsys.readouterr().out)


def test_no_pass_over_the_file_and_no_memory_for_it(recipe: Path, tmp_path: Path) -> None:
    """A file of 4 GB, of which the first block is text and the rest one line that nobody reads."""
    text = write_splits(tmp_path / "text", ENGLISH[:300], ENGLISH[300:350], ENGLISH[350:400])
    block, lines = 1 << 16, "".join(f"{line}\n" for line in ENGLISH).encode()
    with (text / "train.txt").open("wb") as file:
        file.write((lines * 9)[: block - 1] + b"\n")
        file.truncate(4 << 30)
    code = f"""
import resource
import numpy as np
from vae_ds.data.corpora import stream
from vae_ds.training import trainer
assert stream.BLOCK_BYTES == {block}
stream.WINDOW_BLOCKS = 1
stream.LineStream._order = lambda self, seed, *keys: np.arange(self.blocks)
trainer.train({str(recipe)!r}, {str(tmp_path / "run")!r}, ["data.path={text}"])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    finished = launch(["-c", code], processes=1, timeout_s=200)
    (peak_mb,) = re.findall(r"PEAK (\d+)", finished.output)
    assert int(peak_mb) < 2000
    assert len(curve(tmp_path / "run")) == 49
