"""Engines compute the losses of rows that follow a soft prompt ("rows behind a prompt"), and the prompt's gradient.

In: a window of examples. Out: the summed loss and the number of targets; the prompt's gradient has been accumulated.

`microbatch_engine` cuts the window into micro-batches, and a schedule runs them. `padded_schedule` pads rows and works
for any causal language model. The packed schedules concatenate rows and run the prompt once per window (with a sharded
decoder, once per micro-batch): `bloom_schedule` and `layer_major` use this project's forward of BLOOM;
`decoder_schedule` uses the base's own layers, if they use transformers' attention interface. `choice` chooses between
the padded and the packed engine of a training run after `self_check` has compared them; `factory` builds either.
"""
