"""What every package may use: errors, atomic file writes, locks, hub access, torchrun's environment.

Nothing here knows rows, models or runs.
"""
