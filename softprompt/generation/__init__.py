"""Answer questions with a frozen base behind one or several soft prompts.

Comes in: questions (texts, or rows with the columns of a template), adapters, generation settings.
Goes out: texts, choices with their probabilities, log-likelihoods of given answers.

One question passes through: `encode_questions` (text → token ids) → `requests` (ids, prompt, settings, seed) → a
`generator` (`continuous_batching` over BLOOM's weights, `hf_generate` over any other base) → `outputs` (ids → text).
`likelihood` scores given answers instead of writing new ones; `voting` lets several prompts answer together.
"""
