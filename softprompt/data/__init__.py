"""From a dataset to windows of token ids.

In: a file, folder or hub id. Out: examples (token ids with labels) and a loader that yields the rows of each optimizer
step. Nothing here knows the prompt, a device or a model.
"""
