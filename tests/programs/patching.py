"""Replaces functions of the package from outside, for faults that no switch of the package can cause."""

import functools
import sys
import time

BEGAN = time.monotonic()  # before a program imports the package


def replace(module, name, wrap):
    """Replaces `module.name` by `wrap(it)`, also in the modules that have already imported it by name.

    Modules that are imported later get it from `module`. The wrapper may call the original.
    """
    original = getattr(module, name)
    replacement = functools.wraps(original)(wrap(original))
    for each in [each for key, each in sys.modules.items() if key.startswith("hvd_vgg.") or each is module]:
        if vars(each).get(name) is original:
            setattr(each, name, replacement)
