"""Settings: dataclasses with a default and help text per field, presets, TOML files, and their validation.

In: flags, a TOML file or keyword arguments. Out: one validated, frozen `TrainConfig` or `InferConfig`.
"""
