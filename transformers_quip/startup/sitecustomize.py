"""Loads transformers_quip in every Python that is started with this folder on PYTHONPATH, when it imports Transformers.

Python imports a module of this name when it starts. Other modules of that name on the path are run too. Nothing is
imported here that a program has not imported itself: a program that does not import Transformers is not affected.
"""

import os
import sys
from _thread import get_ident
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


class _LoadsQuip:
    """Finds `transformers` by asking the other finders, and imports transformers_quip right after it.

    It stays until that has happened: many programs ask where `transformers` is, and import it later.
    """

    def __init__(self):
        self._asking = set()  # threads

    def find_spec(self, name, path=None, target=None):
        if name != "transformers" or get_ident() in self._asking:
            return None
        self._asking.add(get_ident())
        try:
            for finder in sys.meta_path:
                spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _ThenQuip(spec.loader, self)
                    return spec
        finally:
            self._asking.remove(get_ident())
        return None


class _ThenQuip:
    """The module's own loader, and the import of transformers_quip after it."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader  # nothing of this shows afterwards
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            import transformers_quip  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"'transformers-quip run' was asked to load transformers_quip, and {sys.executable} cannot import it "
                f"({error}): install transformers-quip for that Python, or take {_HERE} off PYTHONPATH"
            ) from error


def _run_the_next_one():
    """Run the sitecustomize that this one hides."""
    path = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, _LoadsQuip())
_run_the_next_one()
