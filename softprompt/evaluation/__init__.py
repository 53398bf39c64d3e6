"""Evaluate prompts on held-out rows.

In: an engine, a generator, and tokenized rows with their answers. Out: loss, perplexity and exact match (`evaluator`),
during training as well as afterwards; for several adapters on one dataset, a table of these metrics with accuracy,
macro F1 and confusion matrices of labels (`side_by_side`, `comparison_report`); for several prompts that vote, the
metrics of the ensemble (`ensemble`).

Loss and perplexity are over all targets of all rows. Exact match is only over the rows whose expected answer was not
truncated by max_length.
"""
