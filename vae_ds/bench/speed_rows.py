"""What the measures of `vae-ds bench speed` share: the rows of its table, and the place where a measure works."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vae_ds.bench import profiles
from vae_ds.bench.contest import Apart, Here, Host, Middle
from vae_ds.bench.contestants import make


@dataclass(frozen=True)
class Row:
    """One measured value.

    measure: the name for `--only`. case: what was measured. value: None if it was not measured, for `reason`.
    low, high: quartiles over `pairs` rounds. goal: the lower and the upper limit, None for none.
    is_noisy: the quartiles are far apart, there are fewer than three pairs, or other programs used the machine.
    facts: further numbers, such as tokens per second of each contestant.
    """

    measure: str
    case: str
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    goal: tuple[float | None, float | None] = (None, None)
    is_noisy: bool = False
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the value is within the goal; None without a value."""
        if self.value is None:
            return None
        least, most = self.goal
        return (least is None or self.value >= least) and (most is None or self.value <= most)


def row_of(
    measure: str, case: str, unit: str, found: Middle, goal: tuple[float | None, float | None], **facts: Any
) -> Row:
    """The row of a paired measurement."""
    return Row(
        measure, case, unit, found.value, found.low, found.high, found.of, goal, found.is_noisy, facts=facts
    )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a measure works and how large it is.

    is_quick: the smallest size, in this process: it shows that a measure works, its numbers mean nothing.
    lines: the largest text of the measure `start`.
    """

    folder: Path
    is_quick: bool = False
    lines: int = 1_000_000

    @property
    def rounds(self) -> int:
        return 1 if self.is_quick else 7

    @property
    def shape(self) -> str:
        """The shape of the rows that are about t5-small."""
        return "tiny" if self.is_quick else "t5-small"

    def base(self, shape: str | None = None) -> str:
        """A base with random weights of a shape, by default that of `shape`; `shipped` is the shipped tiny T5."""
        if self.is_quick or shape == "shipped":
            return "tiny"
        folder = self.folder / "bases" / (shape or self.shape)
        return str(folder if folder.is_dir() else profiles.random_base(folder, shape or self.shape))

    def text(self, profile: str, sentences: int) -> Path:
        """A directory with so many training sentences of a profile, and few of the other splits."""
        folder = self.folder / "text" / f"{profile}-{sentences}"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for split, count, seed in (("train", sentences, 0), ("valid", 64, 1), ("test", 64, 2)):
                lines = profiles.texts(profile, count, seed)
                (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def spec(
        self, kind: str, profile: str, *, batch: int, phase: int = 1, batches: int = 64, **more: Any
    ) -> dict[str, Any]:
        """The settings of a contestant (contestants.py). Its text has so many `batches`."""
        batch = min(batch, 4) if self.is_quick else batch
        most = (
            min(profiles.PROFILES[profile].max_tokens, 24) if self.is_quick else profiles.PROFILES[profile].max_tokens
        )
        return {
            **{"kind": kind, "base": self.base(more.pop("shape", None)), "batch": batch, "phase": phase},
            **{"data": str(self.text(profile, 64 if self.is_quick else batches * batch)), "max_tokens": most},
            **{"run_dir": str(self.folder / "run"), "width": 32 if self.is_quick else 256, **more},
        }

    def host(self, specs: Mapping[str, Mapping[str, Any]], name: str, processes: int = 1) -> Host:
        """Contestants with one thread per rank: in this process if the size is quick, else in a process per rank."""
        if self.is_quick:
            return Here({name: make(spec) for name, spec in specs.items()})
        return Apart(specs, self.folder / name, processes=processes)
