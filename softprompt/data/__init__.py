"""From a dataset to the rows of each optimizer step.

In: a file, folder or hub id. Out: examples (token ids with labels), and a loader that yields the examples of each
optimizer step (a window). The steps in between are readers, splits, dataset (checked rows), tokenization, dataloader.
This package does not know about prompts, devices or models.
"""
