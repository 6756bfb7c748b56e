"""The text of the file in an export that transformers loads with `trust_remote_code=True`.

It is put together from the sources of this wing, so that there is one implementation.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL_TYPE = "vae_ds"
CODE = "modeling_vae_ds.py"
# What the file has of each source. An entry with a dot is a method. None stands for all of a file.
PARTS: dict[str, tuple[str, ...] | None] = {
    "bases.py": ("FAMILIES", "tie"),
    "injection.py": None,
    "gaussian.py": ("LOG_2PI", "log_density", "log_prior"),
    "prior.py": None,
    "bottleneck.py": None,
    "token_losses.py": None,
    "t5vae.py": (
        *("T5VAE.encode", "T5VAE.reconstruction", "T5VAE.token_losses", "T5VAE.generate"),
        *("T5VAE._memory", "T5VAE._is_divided", "T5VAE._cache"),
    ),
    "auto.py": ("Posterior", "VaeDsConfig", "VaeDsModel"),
}
HEAD = '''"""A text VAE of vae_ds in plain transformers: needs torch and transformers 5, and not vae_ds.

    model = AutoModel.from_pretrained(PATH, trust_remote_code=True)
    mu, logvar = model.encode(input_ids, attention_mask)  # each (sentences, latent units)
    token_ids = model.generate(mu, max_new_tokens=64)
    mu = model.sample_codes(5)  # codes of new sentences, drawn from the prior

The file was made by vae_ds from its sources (Apache-2.0).
"""

from __future__ import annotations
'''


def entries(dtype: str) -> dict[str, Any]:
    """What transformers reads in the `config.json` of an export. `dtype` is that of the stored weights."""
    module = CODE.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VaeDsModel"],
        "auto_map": {"AutoConfig": f"{module}.VaeDsConfig", "AutoModel": f"{module}.VaeDsModel"},
        "dtype": dtype,
    }


@functools.cache
def source() -> str:
    """The text of the file."""
    imports: dict[str, tuple[str, str]] = {}
    body: list[str] = []
    for name, wanted in PARTS.items():
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports |= _imports(tree)
        body += _parts(text, tree, wanted)
    code = "\n\n\n".join(body)
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    grouped: dict[str, list[str]] = {}
    for name in sorted(used & imports.keys()):
        start, alias = imports[name]
        grouped.setdefault(start, []).append(alias)
    lines = [
        f"{start}{', '.join(names)}" for start, names in sorted(grouped.items(), key=lambda one: one[0][:4] == "from")
    ]
    return "\n".join([HEAD, *lines]) + "\n\n\n" + code + "\n"


def _imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """How each name is imported from elsewhere than vae_ds: the line up to the name, and the name with its alias."""
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("vae_ds"):
            found |= {one.asname or one.name: (f"from {node.module} import ", ast.unparse(one)) for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.asname or one.name: (f"import {ast.unparse(one)}", "") for one in node.names}
    return found


def _parts(text: str, tree: ast.Module, wanted: tuple[str, ...] | None) -> Iterator[str]:
    methods = []
    for node in tree.body:
        name = _name(node)
        if name is not None and (wanted is None or name in wanted):
            yield _text(text, node)
        elif isinstance(node, ast.ClassDef):
            methods += [
                _text(text, one) for one in node.body if wanted is not None and f"{name}.{_name(one)}" in wanted
            ]
            if methods and node.name == "T5VAE":
                inside = "\n\n".join(f"    {method}" for method in methods)
                yield f'class T5VAE:\n    """The methods of the network."""\n\n{inside}'


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return next((target.id for target in targets if isinstance(target, ast.Name)), None)


def _text(text: str, node: Any) -> str:
    """The source of a class, a function or an assignment, with its decorators."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno]).strip()
