"""Metrics: tensors in, numbers out. docs/metrics.md defines them."""
