"""Trains the reference models: one run, or the grid of a paper's table; `mmfast train` on the command line."""
