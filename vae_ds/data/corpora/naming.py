"""The settings of a source that the user names in one word: a directory, a file, a built-in corpus or a data set."""

from pathlib import Path
from typing import Any

from vae_ds.config import DataConfig
from vae_ds.data.corpora import layouts, text_files
from vae_ds.errors import DataError

BUILT_IN = ("docstrings", "wordnet", "grammar", *layouts.LAYOUTS)
DRAWN = 2000  # sentences to draw from one file as valid, and as many as test
DRAWN_SHARE = 0.05  # of a small file
SMALL_BYTES = 1 << 23  # about eighty thousand sentences: 2,000 would be more than 2.5 % of a smaller file

Tree = dict[str, Any]


def named(source: str, column: str | None = None, streaming: bool = False) -> Tree:
    """The `data` section of a recipe for a source.

    source: a built-in corpus, a directory with text files or of a data set, a text file (valid and test are then drawn
        from it), or the name of a data set on the hub. A built-in name wins; `./ptb` is the directory.
    column: the column with the text. A name of the hub needs it.

    Raises DataError if the source is none of these. The contents are not checked.
    """
    path = Path(source).expanduser()
    kind = "nothing" if source in BUILT_IN else text_files.kind_of(path)
    found: Tree = {"corpus": "text", "path": source}
    if source in BUILT_IN:
        found = {"corpus": source}
    elif kind == "directory":
        found |= _in_directory(source, path, column)
    elif kind == "file":
        if streaming:
            raise DataError(
                f"{source}: valid and test are drawn from one file, which reads all of it, but streaming does not; give"
                " a directory with train.txt, valid.txt and test.txt, or leave out --streaming"
            )
        found["split"] = _split(path.stat().st_size)
    elif kind == "nothing" and column and _can_be_on_hub(source, path):
        found["corpus"] = "dataset"
    else:
        what = f"is a {kind}" if kind != "nothing" else "no such file or directory, and no corpus of this name"
        raise DataError(
            f"{source}: {what}; give a directory with train.txt, valid.txt and test.txt, a text file, one of"
            f" {', '.join(BUILT_IN)}, or the name of a data set on the Hugging Face hub with --column COLUMN"
        )
    return found | ({"column": column} if column else {}) | ({"streaming": True} if streaming else {})


def _in_directory(source: str, folder: Path, column: str | None) -> Tree:
    """What the files of a directory add to the settings, or change."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return {"corpus": "dataset"}
    if _is_located({"path": source}):
        return {}
    single = {"path": source, "split": {"valid": DRAWN, "test": DRAWN}}
    if _is_located(single):
        ((file,),) = text_files.locate(_settings(single)).values()
        return {"split": _split(file.stat().st_size)}
    has_text = any((folder / f"{name}.txt").exists() for names in text_files.NAMES.values() for name in names)
    # Without text files, `data.column` distinguishes a data set from a directory of the wrong name.
    return {"corpus": "dataset"} if column and not has_text else {}


def _is_located(tree: Tree) -> bool:
    try:
        text_files.locate(_settings(tree))
    except DataError:
        return False
    return True


def _settings(tree: Tree) -> DataConfig:
    return DataConfig.model_validate({"corpus": "text", **tree})


def _split(size_bytes: int) -> Tree:
    drawn: float = DRAWN if size_bytes >= SMALL_BYTES else DRAWN_SHARE
    return {"valid": drawn, "test": drawn, "seed": 0}


def _can_be_on_hub(source: str, path: Path) -> bool:
    return not path.is_absolute() and not source.startswith((".", "~")) and source.count("/") <= 1
