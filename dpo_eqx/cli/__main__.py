"""`python -m dpo_eqx.cli`, the same as the command `dpo-eqx`."""

import sys

from ._main import main

sys.exit(main())
