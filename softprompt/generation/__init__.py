"""Answers and likelihoods from a frozen base behind one or several prompts.

In: questions, adapters and generation settings. Out: texts, choices with probabilities, log-likelihoods.
"""
