"""The soft prompt [P, H]: its parameter, its initial values, and its files in PEFT's format.

In: a base's embedding module and settings, or an adapter folder. Out: a `PromptEmbedding`, or an adapter folder.
"""
