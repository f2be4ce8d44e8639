"""`python -m sp_fx.cli` is the command `sp-fx`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
