"""``python -m bandpo`` is the command line."""

import sys

from bandpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
