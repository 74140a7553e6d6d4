"""Magnitudes that papers publish, beside which ours are held. Importable without torch."""

DENSE_KL, MOE_KL = 6.4e-4, 1.5e-3
"""KL (k3) between SGLang and Megatron, nats a token: a dense model of 8B, and Qwen3-30B-A3B. R3
paper, arXiv 2510.11370, section 3; there 7.5e-4 are left of the latter with routes replayed."""
MOE_ROUTERS = 0.10
"""Share of routers that differ there, on the latter. The same paper."""
VLLM_ROUTERS = 0.015
"""Share of routers that differ between vLLM 0.30 in bfloat16 and our trainer in float32 on the
studies' model, median over runs without replay (experiments/results/engine/mismatch.csv); the KL
there, 6.7e-4, is `DENSE_KL` to the eye."""
