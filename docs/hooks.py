"""MkDocs hooks: pages of the site that stand outside docs/, and links that work on GitHub and on the site.

A Markdown file of the repository is written once. Its relative links are those of the repository, so that GitHub
follows them; the hooks translate them into links of the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
# Markdown files outside docs/, and the pages of the site that they become.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ds_configs/README.md": "deepspeed.md",
    "launchers/README.md": "launchers.md",
    "vae_ds/tiny/README.md": "shipped-t5.md",
    "vae_ds/tiny_vae/README.md": "shipped-vae.md",
}
# The README is the front page of the repository, index.md that of the site.
TARGETS = {**PAGES, "README.md": "index.md"}
SOURCES = {page: source for source, page in PAGES.items()}
FENCE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2[`~]*[ \t]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside docs/."""
    for source, page in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        # A model card begins with metadata for the Hugging Face hub.
        files.append(File.generated(config, page, content=FRONT_MATTER.sub("", text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate the links of one page; what stands in code blocks stays as it is."""
    here = page.file.src_uri
    # `split` returns text, code block, fence, text, code block, fence, and so on.
    parts = FENCE.split(markdown)
    parts[::3] = [LINK.sub(lambda link: _link(link, here), text) for text in parts[::3]]
    del parts[2::3]
    return "".join(parts)


def _link(link: re.Match[str], here: str) -> str:
    text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if not path or ":" in path or path.startswith("/"):
        return link[0]
    source = SOURCES.get(here, f"docs/{here}")
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if named in TARGETS:
        page = TARGETS[named]
    elif named.startswith("docs/"):
        page = named.removeprefix("docs/")
    elif (REPOSITORY / named).exists():
        return text  # A file of the repository that is no page of the site: its name alone.
    else:
        return link[0]  # MkDocs warns about it.
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{hash_}{anchor})"
