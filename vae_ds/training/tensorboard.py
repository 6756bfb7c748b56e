"""The TensorBoard event files of a run: tags, layout, HParams entry, texts, figures, and cutting on resume.

The event files are in the run directory itself, because TensorBoard names a run by the directory of its event files:
`tensorboard --logdir runs` shows runs/demo as `demo`. A resumed run cuts the points past its checkpoint and adds an
event file, so its curves continue. TensorBoard's own purge mark is not enough, because its default (Rust) loader
ignores it.

A curve's tag is `<group>/<key>/<split>`, such as `1_objective/nelbo/valid`; `key` is the key in the JSON files.
TensorBoard sorts groups by name, so the number in a group's name is its place on the page. GROUPS lists them.
Texts have the tag `<split>/<name>`. TensorBoard shows them on a page of their own.

Up to version 0.1 the event files were in `tensorboard/` and the tags were `<split>/<key>`. `cut` moves such files
into the run directory and renames their tags.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ds.runtime import records
from vae_ds.training.display import is_number

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

GROUPS = {
    "1_objective": ("nelbo", "loss"),
    "2_terms": ("rec", "kl", "kl_weighted", "kl_normal"),
    "3_latent": ("mi", "mi_ceiling", "mi_train", "au", "z_gain", "lm_gain", "kl_per_dim", "nelbo_above_yardstick"),
    "4_optimizer": ("beta", "lr", "grad_norm", "epoch", "skipped_steps", "aggressive"),
    "5_speed": ("tokens_per_s", "texts_per_s", "padding", "positions_per_s", "tflops", "mfu", "peak_memory_gb"),
    "6_other": (),
    "7_evaluation": (),
    "8_checkpoint": ("size_bytes", "copy_s", "stall_s", "write_s"),
}
"""The groups of curves in the order of TensorBoard's page, with their keys. Losses of a pretraining (`*_per_token`,
`*_per_sentence`) are in `1_objective`, the parts of a step (`share_*`) in `5_speed`, other keys in `6_other`.
`7_evaluation` has the metrics of eval-<split>.json."""

EXTENT = {"sentences", "tokens", "words", "iw_sentences", "iw_samples", "mi_sentences", "mi_train_sentences"}
"""The keys that describe the extent of an evaluation. They are constant, so they get no curve."""

ERROR = "_se"
"""The end of the key of a standard error. Standard errors get no curve: they are in evaluations.jsonl."""

NOT_HPARAMS = re.compile(
    r"(schema_version|name|deepspeed|export|max_skipped_steps|profile"
    r"|(profile|logging|checkpoint|timeouts|validation|evaluation)\..*"
    r"|data\.(?!(corpus|path|limit|max_tokens)$).*|batch\.(micro|tokens|bucket_batches)|phases\.\d+\.name)$"
)
"""The settings that are no hyperparameters: how a run is named, stored, watched and measured, and details of data."""

ONCE = ("_hparams_/", "custom_scalars__config__")  # TensorBoard keeps the first of these in a run, so there is only one


def tag_of(key: str, split: str | None = None) -> str:
    """The tag of a curve, such as `2_terms/kl/train`. A checkpoint's curves belong to no split (None)."""
    group = next((group for group, keys in GROUPS.items() if key in keys), "6_other")
    if key.endswith(("_per_token", "_per_sentence")):
        group = "1_objective"
    if key.startswith("share_"):
        group = "5_speed"
    return "/".join(part for part in (group, key, split) if part)


def curves_of(values: Mapping[str, Any], split: str | None) -> dict[str, float]:
    """The points of the curves of a row or an evaluation, by tag."""
    return {tag_of(key, split): value for key, value in _numbers(values).items()}


def layout_of(keys: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts of the Custom Scalars page, for a run that logs `keys`: a VAE has `kl`, a pretraining has not.

    TensorBoard reads a tag here as a regular expression from the tag's start: `2_terms/kl/` is KL of all splits.
    """
    speed = {"Throughput (tokens/s)": ["Multiline", [tag_of("tokens_per_s", "train")]]}
    if "kl" not in keys:
        return {"Pretraining": {"Losses (nats)": ["Multiline", ["1_objective/"]]} | speed}
    charts = {
        "Objective: nelbo = rec + kl (nats per sentence)": ("nelbo", "rec", "kl"),
        "KL and weighted KL (nats per sentence)": ("kl", "kl_weighted", "kl_normal"),
        "beta, the weight of the KL": ("beta",),
        "Mutual information within the validation sentences, and its limit (nats)": ("mi", "mi_ceiling"),
        "Active units": ("au",),
        "z_gain (nats per sentence)": ("z_gain",),
    }
    lines = {title: ["Multiline", [f"{tag_of(key)}/" for key in of_chart]] for title, of_chart in charts.items()}
    return {"VAE": lines | speed}


def hparams_of(recipe: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The settings of a recipe, given as a tree, that a study can vary: dotted key, value.

    A list of values becomes one string, and so do true and false; null is left out. NOT_HPARAMS are left out.
    """
    return {key: value for key, value in _leaves(recipe) if not NOT_HPARAMS.match(key)}


class Events:
    """Writes the event files of a run. The first call that has something to write opens the file."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        # TensorBoard takes the first session mark of a run as its start and purges only at later marks, so a run
        # needs a mark in its first file too.
        self._purge_step = 0
        self._writer: SummaryWriter | None = None
        self._has_layout = False

    @property
    def is_open(self) -> bool:
        return self._writer is not None

    def resume_after(self, last_step: int) -> None:
        """Cut all points past `last_step` from the existing files; -1 cuts all points."""
        cut(self._run_dir, last_step)
        # The files are correct for a server that starts now. The mark is for one that has read the cut points.
        self._purge_step = last_step + 1

    def scalars(self, values: Mapping[str, Any], split: str | None, step: int) -> None:
        """Add a point to the curve of each number in `values`."""
        numbers = _numbers(values)
        writer = self._open()
        if split is not None and not self._has_layout:
            writer.add_custom_scalars(layout_of(numbers))
            self._has_layout = True
        for key, value in numbers.items():
            writer.add_scalar(tag_of(key, split), value, step)

    def histogram(self, key: str, values: Iterable[float], split: str, step: int) -> None:
        """Add a histogram of the finite numbers in `values`, if there are any."""
        finite = [float(value) for value in values if math.isfinite(value)]
        if finite:
            import numpy as np

            self._open().add_histogram(tag_of(key, split), np.asarray(finite), step)

    def text(self, name: str, markdown: str, split: str, step: int) -> None:
        self._open().add_text(f"{split}/{name}", markdown, step)

    def begin_run(self, recipe: Mapping[str, Any]) -> None:
        """Write the run's HParams entry. Its metrics are the last points of the run's curves.

        There is no `experiment` record: with one, TensorBoard shows the settings of a single run's record for all
        runs. Without it, TensorBoard collects the settings of all runs and shows those that differ first.
        """
        from torch.utils.tensorboard.summary import hparams

        _, session_start, _ = hparams(hparams_of(recipe), {})
        self._add_summary(session_start)

    def end_run(self) -> None:
        """Mark the HParams entry as successful."""
        from torch.utils.tensorboard.summary import hparams

        _, _, session_end = hparams({}, {})
        self._add_summary(session_end)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run_dir), purge_step=self._purge_step)
        return self._writer

    def _add_summary(self, summary: Summary) -> None:
        writer = self._open()
        writer._get_file_writer().add_summary(summary)
        writer.flush()


def add_figures(directory: str | Path, figures: Mapping[str, str | Path], step: int = 0) -> None:
    """Show PNG files as images of the run whose directory this is: `figures` maps a tag to a file.

    They replace the figures of an earlier call for the same directory. Do not use the directory of a run that is
    training: TensorBoard's Python loader stops reading a run's older event files when it finds a newer one.
    Raises ValueError for a file that is not PNG.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for tag, path in figures.items():
        content = Path(path).read_bytes()
        if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
            raise ValueError(f"{path}: not a PNG file")
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
        values.append(Summary.Value(tag=tag, image=image))
    _write_apart(Path(directory), ".figures", Summary(value=values), step)


def add_evaluation(run_dir: str | Path, split: str, metrics: Mapping[str, Any], step: int) -> None:
    """Add the metrics of an evaluation after training (eval-<split>.json) to the run and to its HParams entry.

    They are points at `step` with tags such as `7_evaluation/iw_nll/test`, and replace those of an earlier evaluation
    of the same split. Do not call it for a run that is training, for the reason given in `add_figures`.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = _numbers(records.unpacked(metrics))
    values = [Summary.Value(tag=f"7_evaluation/{key}/{split}", simple_value=n) for key, n in numbers.items()]
    _write_apart(Path(run_dir), f".eval-{split}", Summary(value=values), step)


def record_evaluation(run_dir: Path, split: str, metrics: Mapping[str, Any]) -> None:
    """Call `add_evaluation` for a run directory that has TensorBoard files; do nothing for any other directory."""
    status = records.read_status(run_dir)
    if status is not None and status["state"] != "running" and any(run_dir.glob("*tfevents*")):
        add_evaluation(run_dir, split, metrics, int(status.get("step") or 0))


def cut(run_dir: Path, last_step: int) -> None:
    """Cut the points past `last_step` from a run's event files, and records that a crash left unfinished.

    Also removes the layout and the HParams entry, which the resumed run writes anew, and moves files of version 0.1
    from `tensorboard/` into the run directory, with the present tags.
    """
    for path in run_dir.glob("*tfevents*"):
        records.replace_file(path, _cut(path.read_bytes(), last_step, old_tags=False))
    old = run_dir / "tensorboard"
    for path in old.glob("*tfevents*"):
        records.replace_file(run_dir / path.name, _cut(path.read_bytes(), last_step, old_tags=True))
        path.unlink()
    with suppress(OSError):  # it does not exist, or it contains files of the user
        old.rmdir()


def escape(text: str) -> str:
    """`text` as one line that Markdown and HTML show unchanged, also in a table cell."""
    return re.sub(r"[\\`*_\[\]<>&|~]", lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; the cells of `rows` are plain text."""
    lines = [header, ("---",) * len(header), *(tuple(escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that become curves."""
    left_out = EXTENT | {"step"}
    return {k: v for k, v in values.items() if is_number(v) and k not in left_out and not k.endswith(ERROR)}


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, int | float | str]]:
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        yield from _leaves({str(index): item for index, item in enumerate(tree)}, key)
    elif isinstance(tree, list | tuple):
        yield key, ", ".join(map(str, tree)) or "none"
    elif is_number(tree):
        yield key, tree
    elif tree is not None:
        yield key, str(tree).lower() if isinstance(tree, bool) else str(tree)


def _write_apart(directory: Path, suffix: str, summary: Summary, step: int) -> None:
    """Write `summary` to an event file of its own, which replaces the earlier ones with the same suffix."""
    from torch.utils.tensorboard.writer import FileWriter

    earlier = [path for path in directory.glob("*tfevents*") if path.name.endswith(suffix)]
    writer = FileWriter(str(directory), filename_suffix=suffix)
    writer.add_summary(summary, step)
    writer.close()
    for path in earlier:
        path.unlink()


def _cut(content: bytes, last_step: int, old_tags: bool) -> bytes:
    """The records of an event file that stay.

    A record is its length (8 bytes, little endian), a checksum (4), an Event message and its checksum (4).
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    kept = []
    begin = 0
    while begin + 12 <= len(content):
        end = begin + 12 + int.from_bytes(content[begin : begin + 8], "little") + 4
        try:
            event = Event.FromString(content[begin + 12 : end - 4])
        except DecodeError:
            break
        if end <= len(content):
            kept.append(_kept(event, content[begin:end], last_step, old_tags))
        begin = end
    return b"".join(kept)


def _kept(event: Event, record: bytes, last_step: int, old_tags: bool) -> bytes:
    """The part of one event that stays, as a record; empty if none does."""
    if not event.HasField("summary"):
        return record
    if event.step > last_step:
        return b""
    before = [value.tag for value in event.summary.value]
    for index in reversed(range(len(before))):
        value = event.summary.value[index]
        if value.tag.startswith(ONCE):
            del event.summary.value[index]
        elif old_tags:
            value.tag = _renamed(value.tag)
    after = [value.tag for value in event.summary.value]
    if after == before:
        return record
    return _record(event) if after else b""


def _record(event: Event) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _renamed(tag: str) -> str:
    """The present tag for a tag of version 0.1: `<split>/<key>` or `checkpoint/<key>`. A text's tag has not changed."""
    first, _, key = tag.partition("/")
    if not key or "/" in key:
        return tag
    return tag_of(key, None if first == "checkpoint" else first)
