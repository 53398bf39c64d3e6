"""The thread of the model, with a batch that is made up."""

from types import SimpleNamespace

from softprompt.generation.requests import GenerationSettings, Request
from softprompt.generation.sampling import RequestState
from softprompt.serving.answer import Answer, Reply
from softprompt.serving.model_thread import ModelThread


def test_an_answer_that_ends_within_a_long_step_is_told_before_its_end(tokenizer):
    """The only step writes three tokens of the first answer; the second one ended without a token before them, as
    answers of transformers' generate do."""
    told = []

    class Batch(list):
        def add(self, requests):
            self += [RequestState(index, request, frozenset({2}), None) for index, request in enumerate(requests)]
            return list(self)

        def step(self, on_token):
            first, second = self
            second.append(2)
            for token in (5, 6, 7):
                first.append(token)
                on_token(first, token)
                told.append(answers[1].finish_reason)
            self.clear()
            thread.stop()

    generator = SimpleNamespace(new_batch=lambda batch_size: Batch())
    thread = ModelThread(generator, 2, SimpleNamespace(call_soon_threadsafe=lambda function: function()))
    request = Request([5], GenerationSettings(max_new_tokens=3, do_sample=False))
    answers = [Answer(request, tokenizer, (), True) for _ in range(2)]
    thread.submit(Reply(answers, 1, 60))
    thread.run()
    assert told == [None, "stop", "stop"]
    assert (answers[0].finish_reason, answers[0].tokens, answers[1].tokens) == ("length", 3, 0)
