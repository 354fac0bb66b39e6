"""`python -m alignjax` -> the command line."""

import sys

from alignjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
