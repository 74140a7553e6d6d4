"""Tests of the real vLLM: collected where it is installed, which is the environment of `make vllm`.

The main suite runs them there from tests/rollout/test_vllm.py. The folder is not named vllm: the
tests' folder is on the path, and that name would be the package where there is no other.
"""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
