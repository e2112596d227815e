"""`python -m magihuman_fast`: the shell command."""

import sys

from .cli import main

sys.exit(main())
