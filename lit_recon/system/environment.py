"""Environment variables that end libraries as they are imported: gone when this module is imported, before them.

Lightning asks for its rank among processes, which has to be a number; matplotlib for a backend that exists, also where
no window is ever opened.
"""

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")

os.environ.pop("MPLBACKEND", None)
for name in RANKS:
    if not os.environ.get(name, "0").isdecimal():
        del os.environ[name]
