"""Engines compute losses of rows behind a soft prompt, and the prompt's gradient.

In: a window of examples. Out: the summed loss and the number of targets; the prompt's gradient has been accumulated.
`padded` works for any causal language model. `packed` is for BLOOM: it runs the forward of `bloom` in the order of a
schedule (`bloom_schedule`, `layer_major`). `factory` chooses the engine.
"""
