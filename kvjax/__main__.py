"""`python -m kvjax`: the same as the command `kvjax`."""

import sys

from kvjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
