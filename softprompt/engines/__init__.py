"""Engines compute losses of rows behind a soft prompt, and the prompt's gradient.

In: a window of examples. Out: the summed loss and the number of targets; the prompt's gradient has been accumulated.
`microbatch_engine` cuts the window into micro-batches, which a schedule runs: `padded_schedule` pads rows and works for
any causal language model; packed schedules concatenate rows and run the prompt once per window: `bloom_schedule` and
`layer_major` with BLOOM's own forward, `decoder_schedule` with the layers of any transformers decoder. `factory`
chooses the schedule, after a `self_check`.
"""
