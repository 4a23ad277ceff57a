"""``python -m flowprefill_sglang`` is ``flowprefill``."""

import sys

from flowprefill_sglang.cli.main import main

if __name__ == "__main__":  # spawned children of SGLang import this module again
    sys.exit(main())
