"""Held-out rows: loss, perplexity, exact match, label scores, adapters side by side.

In: an engine, a generator and held-out examples. Out: metrics under Trainer's names.
"""
