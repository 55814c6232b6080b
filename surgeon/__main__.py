"""`python -m surgeon`: the same as the command `surgeon`."""

import sys

from surgeon.cli import main

sys.exit(main())
