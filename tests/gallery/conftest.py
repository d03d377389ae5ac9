"""A test imports the scripts of the gallery as they import one another."""

import sys
from pathlib import Path

import matplotlib as mpl

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gallery"))
mpl.use("agg")
