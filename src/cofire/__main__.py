"""``python -m cofire`` is the ``cofire`` command."""

import sys

from cofire.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
