"""What every package may use: errors, atomic file writes, locks, safetensors reading, hub access, standard streams.

It knows nothing of rows, prompts, engines or runs.
"""
