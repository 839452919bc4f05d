"""`python -m mend_local up|down|status`."""

import sys

from mend_local.cli import main

sys.exit(main())
