"""``python -m bandpo`` is the command line."""

import sys

from bandpo.cli import main

sys.exit(main())
