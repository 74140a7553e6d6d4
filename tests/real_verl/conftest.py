"""Tests of verl's own trainer: collected where all of it is installed, by `make verl`.

The main suite runs them there from tests/integrations/test_verl.py. The folder is not named verl:
the tests' folder is on the path, and that name would be the package where there is no other.
"""

import os
from importlib.util import find_spec

complete = find_spec("verl") and find_spec("transfer_queue")
collect_ignore_glob = [] if complete else ["test_*.py"]
if complete:  # before verl is imported: it looks for its platform once
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "real_verl.cpu_platform,real_verl.cpu_engine"
