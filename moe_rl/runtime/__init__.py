"""Processes, threads, seeds, signals and clocks."""
