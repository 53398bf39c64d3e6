"""Evaluate prompts on held-out rows.

In: an engine, a generator, and tokenized rows with their answers. Out: loss, perplexity and exact match (`evaluator`),
during training as well as afterwards, and for rows whose answers are labels the classification of each row by its
likeliest label (`classifier`), with accuracy, macro F1 and confusion matrix. `intervals` says how uncertain these
metrics are, `verdict` whether the prompt is of use, and `answer_comparison` shows rows that are answered well and
badly.

For several adapters on one dataset, `side_by_side` and `comparison_report` make a table of the same metrics; for
several prompts that vote, `ensemble` computes the metrics of the ensemble.

Loss and perplexity are over all targets of all rows, and accuracy is over all rows. Exact match is only over the rows
whose expected answer was not truncated by max_length.
"""
