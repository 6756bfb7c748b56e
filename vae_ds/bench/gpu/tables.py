"""The results of the GPU check as Markdown. A cell without a result is empty, and the last column says why."""

from collections.abc import Mapping, Sequence
from typing import Any

from vae_ds.bench.gpu.cells import AFTER_SKIPS, PARTS, REFERENCE, TOLERANCES, Cell, difference
from vae_ds.bench.gpu.results import Result

Values = Mapping[str, Any]
# The columns of a part: the heading, the key of the value, its format. Curves and the reference have their own.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "speed": [
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("with padding", "positions_per_s", ",.0f"),
        ("TFLOP/s", "tflops", ".3g"),
        ("MFU", "mfu", ".1%"),
        ("padding", "padding", ".1%"),
        ("share of data", "share_data", ".1%"),
        ("peak GB", "peak_gb", ".1f"),
    ],
    "waits": [
        ("copies to the host", "to_host", "g"),
        ("of the engine's step", "to_host_engine", "g"),
        ("copies to the device", "to_device", "g"),
        ("of them without waiting", "to_device_without_waiting", "g"),
        ("waits outside of the engine's step", "waits", "g"),
    ],
    "memory": [
        ("sentences", "sentences", "d"),
        ("tokens", "tokens", "d"),
        ("plan GB", "plan_gb", ".2f"),
        ("peak GB", "peak_gb", ".2f"),
        ("peak / plan", "ratio", ".2f"),
    ],
    "resume": [
        ("stopped after step", "stopped_after", "d"),
        ("steps", "steps", "d"),
        ("skipped", "skipped_steps", "d"),
        ("difference", "difference", ".1e"),
        ("tolerance", "tolerance", ".0e"),
    ],
    "evaluation": [
        ("difference", "difference", ".1e"),
        ("tolerance", "tolerance", ".0e"),
        ("texts", "texts", "d"),
        ("equal", "equal_texts", "d"),
    ],
}
CURVES = ["steps", "skipped", "first loss", "last loss", "difference", "tolerance"]


def markdown(cells: Sequence[Cell], found: Mapping[str, Result], reason: str = "not measured yet") -> str:
    """A table for each part. `reason` is why a cell has no result, if it says nothing itself."""
    lines = [_environment(found)]
    reference = next((found[cell.id] for cell in cells if cell.part == REFERENCE and cell.id in found), None)
    for part in dict.fromkeys(cell.part for cell in cells):
        of_part = [cell for cell in cells if cell.part == part]
        columns = COLUMNS.get(part)
        head = [part, *([title for title, _, _ in columns] if columns else CURVES), "why empty, or not as expected"]
        lines += ["", f"**{part}**: {PARTS[part]}.", "", _row(head), "|" + "---|" * len(head)]
        for cell in of_part:
            result = found.get(cell.id, {})
            values = result.get("values")
            if columns is not None:
                shown = [_shown((values or {}).get(key), form) for _, key, form in columns]
                told = _fault(values) if values else result.get("reason", reason)
            else:
                shown, told = _curve(cell, values, reference)
                told = told if values else result.get("reason", reason)
            lines.append(_row([cell.name, *shown, told]))
    return "\n".join(lines) + "\n"


def _curve(cell: Cell, values: Values | None, reference: Result | None) -> tuple[list[str], str]:
    if values is None:
        return [""] * len(CURVES), ""
    skipped, losses = values["skipped_steps"], values["losses"]
    ends = [_shown(losses[place], ".2f") for place in (0, -1)]
    shown = [str(values["steps"]), str(skipped), *ends]
    if cell.part == REFERENCE:
        return [*shown, "", ""], ""
    expected = (reference or {}).get("values")
    if expected is None:
        return [*shown, "", ""], "the reference is missing"
    tolerance = AFTER_SKIPS if skipped else TOLERANCES[cell.part.removeprefix("curves-")]
    far = difference(losses, expected["losses"])
    told = "" if far is not None and far <= tolerance else "differs from the reference"
    return [*shown, _shown(far, ".1e"), f"{tolerance:.0e}"], told


def _fault(values: Values) -> str:
    """What is not as expected in the values of a cell, or why some are empty."""
    if "tolerance" in values:
        is_near = values["difference"] is not None and values["difference"] <= values["tolerance"]
        return "" if is_near else "differs by more than the tolerance"
    if values.get("to_host", 0) > 1:
        return "more than one copy to the host"
    if "waits" in values and values["waits"] is None:
        return "waits are those for a GPU"
    if values.get("waits", 0) > 1:
        return "waits at " + ", ".join(f"`{place}`" for place in values["waits_at"])
    if "peak_gb" in values and values["peak_gb"] is None:
        return "a CPU has no peak of its own"
    return ""


def _environment(found: Mapping[str, Result]) -> str:
    """The hardware, versions and days of the results."""
    told = []
    for result in found.values():
        about = result.get("environment")
        if about:
            packages = [f"{name} {about['packages'].get(name)}" for name in ("torch", "transformers", "deepspeed")]
            told.append(f"{'; '.join(about['devices'])}; {', '.join(packages)}; {about['time'][:10]}")
    return "\n".join(f"- {line}" for line in dict.fromkeys(told)) or "No result yet."


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
