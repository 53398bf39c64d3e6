"""Answer questions with a frozen base and one or several soft prompts.

In: questions (texts, or rows with the columns of a template), adapters and generation settings.
Out: answers as texts, choices with their probabilities, or log-likelihoods of given answers.

A question passes through `encode_questions` (text → token ids), `requests` (token ids, prompt, settings, seed), a
`generator` (`continuous_batching` for BLOOM and for decoders that pass `decoding_check`, else `hf_generate`) and
`outputs` (token ids → text). `likelihood` scores given answers instead of generating new ones. `voting` combines the
answers of several prompts.
"""
