"""Runs and report of the experiments on representation collapse: `mmfast train collapse`, `mmfast report collapse`."""
