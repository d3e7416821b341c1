<<<<<<< HEAD
"""Entry point of `python -m ifjax`."""
=======
"""The entry point of `python -m ifjax`."""
>>>>>>> words2

import sys

from ifjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
