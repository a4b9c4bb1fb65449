"""With this folder on PYTHONPATH, the packages named in $HIDDEN_PACKAGES (`a,b`) cannot be imported."""

import os
import sys
from importlib.machinery import PathFinder

_HIDDEN = set(os.environ.get("HIDDEN_PACKAGES", "").split(","))


class _Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.split(".")[0] in _HIDDEN:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _Finder
