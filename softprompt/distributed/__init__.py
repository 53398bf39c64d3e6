"""Several processes in one run: torchrun's ranks, their rendezvous, and the watchdog that names a lost rank.

In: what torchrun puts into the environment. Out: a `World` with the collective operations that a run needs.
"""
