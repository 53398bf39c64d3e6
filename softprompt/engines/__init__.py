"""Engines compute the prompt's gradient over a window of rows.

In: a window of examples. Out: the summed loss and the target count; the prompt's gradient has been accumulated.
"""
