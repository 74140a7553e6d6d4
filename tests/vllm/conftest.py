"""Tests of the real vLLM: collected where it is installed, which is the environment of `make vllm`.

The main suite runs them there from tests/rollout/test_vllm.py.
"""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
