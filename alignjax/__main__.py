"""`python -m alignjax` -> the command line."""

import sys

from alignjax.cli.main import program

if __name__ == "__main__":
    sys.exit(program())
