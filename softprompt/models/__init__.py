"""The frozen base: loading, freezing, precision, quantization, sharding, and weights that stay in their files.

In: a folder or a hub id. Out: a frozen transformers model on its device; for BLOOM also `BloomWeights`, which yields
the parameters block by block, wherever they are stored.
"""
