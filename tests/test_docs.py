"""The documentation against the code: settings, recipes, commands, arithmetic, links, reference pages, version."""

import argparse
import ast
import csv
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import vae_ds
from support import ROOT
from vae_ds import config
from vae_ds.cli import parser

DOCS = ROOT / "docs"
README_LINES = 200
# What GitHub shows. The pages of the site are checked by `mkdocs build --strict`, and here too.
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / name / "README.md" for name in ("launchers", "ds_configs")),
        *DOCS.rglob("*.md"),
    ]
)
REFERENCE = DOCS / "reference"
# Messages of PyTorch, of the system and of SLURM.
OTHERS_MESSAGES = {"CUDA out of memory", "No space left on device", "DependencyNeverSatisfied"}
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# Settings, recipes, commands


def test_the_readme_is_short() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= README_LINES


def test_every_setting_is_in_the_reference() -> None:
    """`vae-ds recipes keys` prints these rows. Paste them after a change of the settings."""
    told = re.search(r"<!-- recipe keys.*?-->(.*?)<!-- end of recipe keys -->", text(DOCS / "recipes.md"), re.DOTALL)
    assert told is not None
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in config.reference()]
    assert rows == [line for line in told[1].splitlines() if line.startswith("| `")]


def test_every_shipped_recipe_is_named() -> None:
    for name in config.shipped_recipes():
        assert f"`{name}`" in text(DOCS / "recipes.md"), name


def commands(of: argparse.ArgumentParser) -> Iterator[str]:
    """Every command of a parser, those of its subcommands as `bench soak`."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                inner = list(commands(one))
                yield from [f"{name} {below}" for below in inner] or [name]


def test_every_command_is_named() -> None:
    named = list(commands(parser()))
    assert {"train", "bench soak"} <= set(named)
    told = text(ROOT / "README.md") + text(DOCS / "commands.md")
    missing = [name for name in named if not re.search(rf"(?:vae-ds |`){re.escape(name)}\b", told)]
    assert missing == []


def test_the_arithmetic_on_the_paper_holds() -> None:
    """Each row of the table on the printed Yahoo rows follows from its PPL, KL and -ELBO."""
    page = text(DOCS / "published-code.md")
    table = page[page.index("| row | PPL | KL | printed -ELBO") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 4
    for line in table:
        ppl, kl, printed, naive, rec, corrected = (float(cell) for cell in line.split("|")[2:-1])
        assert round(printed / math.log(ppl), 1) == naive
        assert round(printed + kl, 1) == rec
        assert round((printed + 2 * kl) / math.log(ppl), 1) == corrected == 113.0


def test_the_published_rows_are_those_of_the_file() -> None:
    """Paste these lines after a change of published.csv."""
    told = re.search(r"<!-- published rows.*?-->(.*?)<!-- end of published rows -->", text(DOCS / "published.md"), re.S)
    assert told is not None
    lines = text(ROOT / "vae_ds" / "studies" / "published" / "published.csv").splitlines()
    expected = []
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["source"] != "Park & Lee 2021":
            source = f"{row['source']}, {row['table']}" + (f", from {row['quoted_from']}" if row["quoted_from"] else "")
            numbers = [row[key] for key in ("iw_nll", "nelbo_printed", "kl", "mi", "au", "ppl", "iw_ppl")]
            cells = [row["corpus"], source, row["model"], *numbers, row["unit"], row["bound"]]
            expected.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    assert expected == [line for line in told[1].splitlines() if line.startswith("|")][2:]


# Messages


@functools.cache
def words_of_the_code() -> str:
    """All strings of the package and the launchers; a placeholder of an f-string is left out."""
    told = []
    for file in [*(ROOT / "vae_ds").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]:
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.JoinedStr):
                told.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                told.append(node.value)
    scripts = [file for file in (ROOT / "launchers").rglob("*") if file.suffix in (".sh", ".sbatch")]
    return "\n".join([*told, *map(text, scripts)])


@pytest.mark.parametrize("page", [ROOT / "launchers" / "README.md", DOCS / "troubleshooting.md"], ids=lambda p: p.stem)
def test_the_messages_are_those_of_the_code(page: Path) -> None:
    """Of each message in a table, three words in a row are in the code; what varies is `...` or an example."""
    code = words_of_the_code()
    tables = re.findall(r"^\| message .*\n\|[-| ]+\n((?:\|.*\n)+)", text(page), re.MULTILINE)
    messages = [
        found
        for table in tables
        for row in table.splitlines()
        for found in re.findall("`([^`]+)`", row[: row.index("|", 2)])
    ]
    assert len(messages) > 5
    missing = []
    for message in sorted(set(messages) - OTHERS_MESSAGES):
        # What has a digit, a dot or a bracket is an example of what varies.
        parts = [part.split() for part in re.split(r"\S*[\d._(]\S*", message)]
        known = [" ".join(words[i : i + 3]) in code for words in parts for i in range(len(words) - 2)]
        if known and not any(known):
            missing.append(message)
    assert missing == []


# Links


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', markdown))
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", FENCE.sub("", markdown), re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(name if not seen[name] else f"{name}-{seen[name]}")
        seen[name] += 1
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or anchor does not exist."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(text(path))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A *title*, here\n[a](#a-title-here) [b](#b) [c](page.md#c) [d](no.md) [e](https://x.org/no.md)\n"
    )
    assert broken_links(page) == ["#b", "page.md#c", "no.md"]


def test_every_page_is_in_the_navigation() -> None:
    """`mkdocs build --strict` says so too, where MkDocs is installed."""
    told = re.findall(r"^ +- (?:[^\n:]+: )?(\S+\.md)$", text(ROOT / "mkdocs.yml"), re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages - set(told) == set()


# The API reference


def public_modules(package: Path) -> Iterator[Path]:
    """The modules and packages that `__all__` of a package names, and those below them."""
    for node in ast.parse(text(package / "__init__.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            for name in ast.literal_eval(node.value):
                if (package / f"{name}.py").is_file():
                    yield package / f"{name}.py"
                elif (package / name / "__init__.py").is_file():
                    yield package / name
                    yield from public_modules(package / name)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_the_reference_has_every_sub_package_and_public_module() -> None:
    package = ROOT / "vae_ds"
    wings = [path.parent for path in package.glob("*/__init__.py")] + [package / "errors.py"]
    for wing in wings:
        page = text(REFERENCE / f"{wing.stem}.md")
        inner = public_modules(wing) if wing.is_dir() else ()
        expected = {dotted(path) for path in (wing, *inner)}
        assert set(re.findall(r"^::: (\S+)$", page, re.MULTILINE)) == expected
    assert {path.stem for path in REFERENCE.glob("*.md")} == {wing.stem for wing in wings} | {"index", "vae_ds"}


# The version


def test_the_version_is_the_same_everywhere() -> None:
    packaged = re.search(r'^    version="(.+)",$', text(ROOT / "setup.py"), re.MULTILINE)
    newest = re.search(r"^## \[(\d[^\]]*)\] - (\S+)$", text(ROOT / "CHANGELOG.md"), re.MULTILINE)
    cited = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert packaged is not None
    assert newest is not None
    assert vae_ds.__version__ == packaged[1] == newest[1] == cited["version"]
    assert str(cited["date-released"]) == newest[2]
