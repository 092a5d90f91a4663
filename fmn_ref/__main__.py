"""python -m fmn_ref: the same as the command fmn-ref."""

import sys

from .cli import main

sys.exit(main())
