"""The HTML report of one or several runs.

In: run folders. Out: one self-contained page.
"""
