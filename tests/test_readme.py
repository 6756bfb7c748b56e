"""The README against the code: its reference of settings, its commands, its arithmetic."""

import math
import re
from pathlib import Path

from vae_ds import config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_setting_stands_in_the_reference() -> None:
    """`vae-ds recipes keys` prints these rows; paste them after a change of the settings."""
    told = re.search(r"<!-- recipe keys.*?-->(.*?)<!-- end of recipe keys -->", README, re.DOTALL)
    assert told is not None
    rows = [f"| `{key}` | {default} | {text} |" for key, default, text in config.reference()]
    assert rows == [line for line in told[1].splitlines() if line.startswith("| `")]


def test_every_shipped_recipe_is_named() -> None:
    for name in config.shipped_recipes():
        assert f"`{name}`" in README, name


def test_the_arithmetic_on_the_paper_holds() -> None:
    """Each row of the README's table on the printed Yahoo rows follows from its PPL, KL and -ELBO."""
    table = README[README.index("| row | PPL | KL | printed -ELBO") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 4
    for line in table:
        ppl, kl, printed, naive, rec, corrected = (float(cell) for cell in line.split("|")[2:-1])
        assert round(printed / math.log(ppl), 1) == naive
        assert round(printed + kl, 1) == rec
        assert round((printed + 2 * kl) / math.log(ppl), 1) == corrected == 113.0
