"""Evaluate prompts on held-out rows.

In: an engine, a generator, and tokenized rows with their answers. Out: loss, perplexity and exact match (`evaluator`),
during training and afterwards. If the answers are labels, `classifier` also classifies each row by its most likely
label, which gives accuracy, macro F1 and a confusion matrix. `intervals` computes how uncertain these metrics are,
`verdict` says whether the prompt is useful, and `answer_comparison` selects rows with right and wrong answers.

For several adapters on one dataset, `side_by_side` and `comparison_report` make a table of the same metrics; for
several prompts that vote, `ensemble` computes the metrics of the ensemble.

Loss and perplexity are over all targets of all rows, and accuracy is over all rows. Exact match is only over the rows
whose expected answer was not truncated by max_length.
"""
