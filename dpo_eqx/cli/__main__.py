"""`python -m dpo_eqx.cli` runs the command `dpo-eqx`."""

import sys

from ._main import main

sys.exit(main())
