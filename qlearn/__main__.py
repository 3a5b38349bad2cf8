"""`python -m qlearn` is the command `qlearn`."""

import sys

from qlearn.cli import main

sys.exit(main())
