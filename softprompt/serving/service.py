"""What the routes share: the model and its thread, the adapters, the limits, and the running requests."""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from softprompt.data.tokenization import Example
from softprompt.engines.memory_estimate import MAX_TOKENS
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.likelihood import ChoiceResult, choice_result, log_likelihoods
from softprompt.generation.model import SoftPromptModel
from softprompt.generation.requests import Request
from softprompt.generation.running_batch import BatchGenerator
from softprompt.models.capabilities import why_not_generate
from softprompt.models.loading import word_embeddings
from softprompt.models.quantization import bits_when_loaded
from softprompt.serving.answer import Answer, Reply
from softprompt.serving.args import Root, ServeArguments
from softprompt.serving.encode import Encoder, base_adapter
from softprompt.serving.errors import NOT_FOUND, ApiError, overloaded
from softprompt.serving.metrics import Metrics
from softprompt.serving.model_thread import ModelThread
from softprompt.serving.registry import Registry, Served
from softprompt.utils.errors import ModelError
from softprompt.utils.std_streams import tell

Result = TypeVar("Result")


class Service:
    """A loaded base that answers the requests of a server.

    Args:
        model: The base. Its own adapters are not served.
        roots: The folders of --adapters.

    Attributes:
        base_id: The name of the base in requests: its hub id, or the name of its folder.
        replies: The replies that are not closed yet.
        scoring: Number of choices whose probabilities are awaited, over all questions.

    Raises:
        ModelError: The base cannot generate with a prompt.
    """

    def __init__(self, model: SoftPromptModel, roots: Sequence[Root], arguments: ServeArguments):
        if model.generator is None:
            raise ModelError(f"{model.name}: {why_not_generate(model.base)}; take another base")
        self.model, self.arguments, self.metrics = model, arguments, Metrics()
        self.generator = cast(BatchGenerator, model.generator)
        self.base_id = base_id(model.name)
        self.base = Served(self.base_id, base_adapter(model.tokenizer), int(time.time()))
        hidden_size = word_embeddings(model.base).embedding_dim
        bits = bits_when_loaded(model.base)
        self.registry = Registry(roots, model.name, hidden_size, bits, self.base_id, tell)
        self.encoder = Encoder(model.base, model.tokenizer, arguments)
        self.replies, self.scoring = set[Reply](), 0
        self._worker = ThreadPoolExecutor(1, "worker")  # reads folders and tokenizes
        self._thread: ModelThread | None = None

    def start(self) -> None:
        """Start the model's thread; call this in the event loop that serves requests."""
        self._thread = ModelThread(self.generator, self.arguments.batch_size, asyncio.get_running_loop())
        self._thread.start()

    async def stop(self) -> None:
        """End the threads, after the step that is running."""
        thread = self._running_thread()
        thread.stop()
        await asyncio.to_thread(thread.join)
        self._worker.shutdown()

    async def find(self, name: str) -> Served:
        """Return the base or adapter of this name.

        Raises:
            ApiError: No base or adapter has this name.
        """
        found = self.base if name == self.base_id else await self.in_worker(self.registry.get, name)
        if found is None:
            message = f"The model '{name:.200}' does not exist. GET /v1/models lists those that do."
            raise ApiError(404, message, NOT_FOUND, "model", "model_not_found")
        return found

    async def in_worker(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that may take long in the worker thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def check_queue(self, **counts: int) -> None:
        """Check that the answers of a request have room in the running batch and the queue.

        Args:
            counts: The factors of the number of answers, by the field of the body that sets each of them.

        Raises:
            ApiError: There are more answers than places (400; `param` is the field with the largest factor), or too few
                places are free (429).
        """
        answers, places = math.prod(counts.values()), self.arguments.batch_size + self.arguments.max_queue
        if answers > places:
            factors = " × ".join(f"{count} of '{field}'" for field, count in counts.items() if count > 1)
            message = f"{answers} answers ({factors}) are more than this server accepts at a time ({places})."
            raise ApiError(400, message, param=max(counts, key=lambda field: counts[field]), code="invalid_value")
        self._check_free(answers)

    def _check_free(self, answers: int) -> None:
        if self.unfinished + answers > self.arguments.batch_size + self.arguments.max_queue:
            raise overloaded("The queue of this server is full. Try again later.")

    @property
    def unfinished(self) -> int:
        """Number of answers and choices that wait or are being computed."""
        return self.scoring + sum(not answer.done for reply in self.replies for answer in reply.answers)

    def submit(self, requests: Sequence[Request], prompt_tokens: int, stops: Sequence[str], continues: bool) -> Reply:
        """Let requests join the batch. The caller has to call `close` with the reply.

        Raises:
            ApiError: The queue is full.
        """
        self._check_free(len(requests))
        answers = [Answer(request, self.model.tokenizer, stops, continues) for request in requests]
        reply = Reply(answers, prompt_tokens, self.arguments.request_timeout)
        self.replies.add(reply)
        self._running_thread().submit(reply)
        return reply

    def close(self, reply: Reply) -> None:
        """Cancel the unfinished answers of a reply, and count its tokens in the metrics."""
        reply.cancel()
        self.replies.discard(reply)
        self.metrics.prompt_tokens += reply.prompt_tokens
        self.metrics.completion_tokens += reply.tokens

    async def classify(
        self, adapter: LoadedAdapter, examples: list[list[Example]], choices: Sequence[str]
    ) -> list[ChoiceResult]:
        """Return for each question the probability of each choice; see `SoftPromptModel.classify`. Between two parts of
        a question, each of about as many tokens as a decoding step prefills, the running answers go on.

        Raises:
            ApiError: The queue is full.
        """

        def score(part: list[Example]) -> list[float]:
            return log_likelihoods(self.model.engine, [adapter.prompt], [part])[0]

        async def of_question(parts: list[list[Example]]) -> ChoiceResult:
            scores = [await self._running_thread().call(partial(score, part)) for part in parts]
            return choice_result([value for some in scores for value in some], choices)

        scoring, tokens = len(examples) * len(choices), MAX_TOKENS[self.model.engine.device.type]
        self._check_free(scoring)
        self.scoring += scoring
        try:
            return [await of_question(_parts(question, tokens)) for question in examples]
        finally:
            self.scoring -= scoring

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Return the current values of further metrics by name, each as (help text, value)."""
        answers = [answer for reply in self.replies for answer in reply.answers if not answer.done]
        running = sum(answer.tokens > 0 for answer in answers)
        return {
            "answers_running": ("Answers that are being generated.", running),
            "answers_waiting": ("Answers that are queued or wait for their first token.", len(answers) - running),
            "places": ("Answers that can be generated at a time.", self.arguments.batch_size),
        }

    def seed(self, given: int | None) -> int:
        """Return the seed of a request, by default a random one."""
        return secrets.randbelow(1 << 63) if given is None else given

    def _running_thread(self) -> ModelThread:
        assert self._thread is not None, "Service.start has not been called"
        return self._thread


def _parts(examples: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Split examples into parts of at most `tokens` tokens, or of one example if it is longer."""
    parts, total = list[list[Example]](), tokens
    for example in examples:
        length = len(example.input_ids)
        if total + length > tokens:
            parts.append([])
            total = 0
        parts[-1].append(example)
        total += length
    return parts


def base_id(name: str) -> str:
    """Return the name of a base without the path of its folder: its id on the hub, or the name of its folder."""
    return Path(name).resolve().name if name != "mini" and Path(name).is_dir() else name
