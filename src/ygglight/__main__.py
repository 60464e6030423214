"""`python -m ygglight`: the same as the `ygglight` command, slower to start because the package is imported first."""

import sys

from ygglight_launcher import main

if __name__ == "__main__":
    sys.exit(main())
