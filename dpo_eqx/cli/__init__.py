"""The command `dpo-eqx`: a shell that reads, composes, loops and writes, and holds no mathematics.

Nothing else of the library imports it.
"""

from ._main import main as main
