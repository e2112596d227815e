"""`python -m magihuman_fast`: the shell command."""

import sys

from .cli.main import main

sys.exit(main())
