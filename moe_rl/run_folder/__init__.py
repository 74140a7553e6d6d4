"""The run folder: logs, checkpoints, sealed folders, trackers."""
