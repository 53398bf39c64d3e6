"""The soft prompt [P, H]: its parameter, its initial values, its nearest tokens, and its files in PEFT's format.

In: settings and a base's embedding module, or an adapter folder. Out: a `PromptEmbedding`, or the files of an adapter.
"""
