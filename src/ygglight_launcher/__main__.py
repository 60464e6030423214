"""`python -m ygglight_launcher`: the `ygglight` command where no console script is installed."""

import sys

from ygglight_launcher import main

if __name__ == "__main__":
    sys.exit(main())
