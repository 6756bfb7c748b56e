"""Do something when another package is imported, and not before: importing it here would take seconds."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, call: Callable[[], Any]) -> None:
    """Call `call` once, as soon as `module` is imported; now if it is."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(module, call))


class _Finder:
    """Finds one module with the other finders, and calls a function after its code has run."""

    def __init__(self, module: str, call: Callable[[], Any]) -> None:
        self._module, self._call = module, call

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(loaded: ModuleType) -> None:
                run(loaded)
                self._call()

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - mypy forbids to assign a method
        return spec
