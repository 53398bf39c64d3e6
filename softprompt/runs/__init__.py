"""A run's folder: its file names, checkpoints, saved state, and reading a run back.

In: files by name. Out: whole checkpoints, or a clear reason why one is not whole.
"""
