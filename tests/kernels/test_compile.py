"""The kernels compile for GPUs that are not here: Triton's compiler needs none.

The interpreter runs any Python; the compiler knows a part of it. In a process of its own, since in
this one the kernels may be the interpreter's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_rl.kernels import triton_backward, triton_logprobs, triton_routing
from moe_rl.kernels.triton_tile import FULL, HALF

kernel, dtype, capability = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = HALF if dtype == "bf16" else FULL
function = {
    "forward": triton_logprobs._forward_kernel,
    "strip": triton_backward._strip_kernel,
    "routing": triton_routing._routing_kernel,
}[kernel]
types = {name: "*" + dtype for name in ("hidden", "weight", "bias", "strip")}
types |= {name: "*i64" for name in ("targets",)} | {"ids": "*i32", "live": "*i16"}
types |= {name: "i32" for name in (
    "num_tokens", "vocab", "width", "hidden_stride", "weight_stride", "start", "stop")}
types |= {"softcap": "fp32"}
constants = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_TEMPERATURE": True, "ENTROPY": True}
constants |= {"UPCAST": False, "PART": triton_logprobs.PART_WORDS}
constants |= {"TOKENS": config.tokens, "WORDS": config.words, "WIDTH": config.width}
if kernel == "routing":
    constants = {"E": 12, "K": 2, "TOKENS": 16, "WIDTH": 16}
names = function.arg_names
# What a launch finds out by itself: aligned pointers and strides, which the loads' pipeline needs.
aligned = [n for n in names if n not in constants and n not in ("softcap", "start", "stop")]
source = ASTSource(
    function,
    {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names},
    {(names.index(n),): value for n, value in constants.items() if n in names},
    {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
)
options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
print(compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"))
"""

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block; CUDA C++ guide, table 27


@pytest.mark.parametrize(
    ("kernel", "dtype", "capability"),
    [
        ("forward", "bf16", 90),
        ("forward", "fp32", 90),
        ("strip", "bf16", 90),
        pytest.param("strip", "bf16", 80, marks=pytest.mark.slow),
        ("routing", "fp32", 90),
    ],
)
def test_a_kernel_compiles_and_fits(
    kernel: str, dtype: str, capability: int, tmp_path: Path
) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, kernel, dtype, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    shared, warpgroup_products = map(int, result.stdout.split())
    assert shared <= SHARED_MEMORY[capability]
    # bfloat16 tiles go to the tensor cores of a Hopper as a whole, float32 ones to none: no TF32.
    assert (warpgroup_products > 0) == (dtype == "bf16" and capability == 90)
