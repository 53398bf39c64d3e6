"""Evaluate prompts on held-out rows.

Comes in: an engine, a generator, tokenised rows with their answers. Goes out: loss, perplexity and exact match
(`evaluator`), during training as well as afterwards; for several adapters on one dataset also accuracy, macro F1 and
confusion matrix of labels, in one table (`side_by_side`, `comparison_report`); for several prompts that vote, the same
metrics of the ensemble (`ensemble`).

Loss and perplexity are over all targets of all rows. Exact match is only over the rows whose expected answer was not
truncated by max_length.
"""
