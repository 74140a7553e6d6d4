"""Run folders in, data frames and statistics out."""
