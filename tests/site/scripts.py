"""Imports the scripts of the documentation, which are no package. It runs none of them."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "scripts"


def script(name):
    """The script of that name, as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
