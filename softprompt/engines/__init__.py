"""Engines compute losses of rows behind a soft prompt, and the prompt's gradient.

In: a window of examples. Out: the summed loss and the number of targets; the prompt's gradient has been accumulated.
Any causal language model: `padded`. BLOOM: `packed`, whose forward is in `bloom` and which a schedule
(`bloom_schedule`, `layer_major`) takes through the blocks. `factory` chooses.
"""
