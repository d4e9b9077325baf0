"""`python -m snapchain`: the same as the `snapchain` command."""

import sys

from snapchain.cli import main

sys.exit(main())
