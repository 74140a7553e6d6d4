"""`python -m moe_rl`: the command line without the installed script."""

import sys

from moe_rl.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
