"""The entry point of `python -m ifjax`."""

import sys

from ifjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
