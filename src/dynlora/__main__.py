"""`python -m dynlora`: the command line."""

import sys

from dynlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
