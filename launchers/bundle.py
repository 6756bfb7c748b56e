"""Copy what a recipe needs to a directory for machines without a network: `bundle.py DIR RECIPE [KEY=VALUE ...]`.

Writes DIR/base (the base model, unless it ships with vae_ds), DIR/corpus (the text), DIR/cache (the token ids of the
text) and DIR/recipe.yaml. Prints the settings that select these copies, one per line, with {here} in place of DIR.
Wrong input: one line on standard error and exit code 2.
"""

import argparse
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae_ds.config import DataConfig, RunConfig

# The files that a base is loaded from. The hub's directories also contain the weights of other frameworks.
PLAIN = ("*.json", "spiece.model", "tokenizer*", "*.jinja")
WEIGHTS = (("*.safetensors",), ("pytorch_model*.bin",))


def take_base(base: str, to: Path) -> list[str]:
    """Copy a base from its directory or the hub, and check the copy. Returns the settings that select the copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from vae_ds.config import hub
    from vae_ds.errors import ConfigError
    from vae_ds.model import bases

    shutil.rmtree(to, ignore_errors=True)
    bases.check_base(base)
    if base == "tiny":
        return []
    source = Path(base).expanduser()
    for weights in WEIGHTS:
        wanted = [*PLAIN, *weights]
        if not Path(base).expanduser().is_dir():
            try:
                with hub.reachable_or_offline():
                    source = Path(snapshot_download(base, allow_patterns=wanted))
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
                raise ConfigError(f"model.base {base}: the download failed: {str(error).splitlines()[0]}") from None
        if any(source.glob(weights[0])):
            break
    to.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in wanted):
            shutil.copyfile(file, to / file.name)
    bases.check_base(str(to))
    bases.load_tokenizer(to)
    return ["model.base={here}/base"]


def _suffixes(file: Path) -> str:
    """The suffix of a text file, with that of its compression: `.txt`, `.csv.gz`."""
    from vae_ds.data.corpora import text_files

    return "".join(file.suffixes[-2:]) if text_files.compression(file) else file.suffix


def take_text(data: "DataConfig", to: Path) -> list[str]:
    """Copy a corpus: its files, or a saved data set if it has no files. Returns the settings that select the copy."""
    from datasets import DatasetDict

    from vae_ds.data import corpora
    from vae_ds.data.corpora import layouts, text, wordnet

    shutil.rmtree(to, ignore_errors=True)
    corpora.check(data)
    settings = ["data.cache_dir=null"]
    if data.corpus == "grammar":  # is generated again, or read from the cache
        return settings
    settings.append("data.path={here}/corpus")
    known = layouts.settings(data) if data.corpus in layouts.LAYOUTS else data
    files: dict[str, Path] = {}
    if known.corpus == "text":
        files = {split + _suffixes(file): file for split, file in text.find(known).items()}
        settings += [f"data.{key}=null" for key in ("train", "valid", "test", "split")]
    elif known.corpus == "wordnet":
        files = {file.name: file for file in wordnet.find(known).values()}
    if files:
        to.mkdir(parents=True)
        for name, file in files.items():
            shutil.copyfile(file, to / name)
        return settings
    # The other machine has other installed packages and cannot reach the hub.
    splits = corpora.load(data).splits
    names = {"train": "train", "valid": "validation", "test": "test"}
    DatasetDict({names[split]: rows for split, rows in splits.items()}).save_to_disk(str(to))
    settings += ["data.corpus=dataset", "data.column=text", "data.subset=null", "data.revision=null"]
    return settings + [f"data.splits.{split}={name}" for split, name in names.items()]


def tokenise(config: "RunConfig", cache: Path) -> None:
    """Fill DIR/cache with the token ids of all splits, under the names that training and evaluation use."""
    from vae_ds.data import corpora, tokens
    from vae_ds.model import bases

    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = bases.load_tokenizer(config.model.base)
    corpus = corpora.load(config.data.model_copy(update={"cache_dir": str(cache)}))
    for split in corpus.splits:
        tokens.tokenise(corpus, split, tokenizer, config.data.max_tokens, cache)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Copy what a recipe needs to a directory for machines without a network."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an existing directory")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="override settings of the recipe")
    given = parser.parse_args()
    from vae_ds import config as configuration
    from vae_ds.config import RunConfig
    from vae_ds.data.corpora.corpus import quiet_datasets
    from vae_ds.errors import UserError

    here: Path = given.directory.resolve()
    try:
        config = configuration.load(RunConfig, given.recipe, given.settings)
        (here / "recipe.yaml").write_text(configuration.dump(config), encoding="utf-8")
        settings = take_base(config.model.base, here / "base")
        with quiet_datasets():
            settings += take_text(config.data, here / "corpus")
            filled = [setting.replace("{here}", str(here)) for setting in settings]
            tokenise(configuration.load(RunConfig, str(here / "recipe.yaml"), filled), here / "cache")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
