"""Studies: a grid of training runs, and what their figures say.

In: a STUDY.toml. Out: a folder of finished cells, a table, charts and conclusions.
"""
