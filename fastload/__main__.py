"""`python -m fastload` is the command `fastload`."""

import sys

from .cli import main

sys.exit(main())
