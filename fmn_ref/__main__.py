"""`python -m fmn_ref` runs the command fmn-ref."""

import sys

from .cli import main

sys.exit(main())
