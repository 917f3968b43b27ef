"""The command `python -m lit_recon.report`."""

import sys

from lit_recon.report.page import main

if __name__ == "__main__":
    sys.exit(main())
