"""Training: set a run up, run the loop, evaluate and save.

In: a `TrainConfig`. Out: a finished `Run` and its folder. Reports and uploads are made by the callers.
"""
