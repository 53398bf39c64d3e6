"""Several processes in one run: torchrun's ranks, their rendezvous, and the watchdog that detects a lost rank.

In: the environment variables that torchrun sets. Out: a `World`, which has the collective operations that a run needs.
"""
