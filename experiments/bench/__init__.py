"""Benchmarks against peers, each one command."""
