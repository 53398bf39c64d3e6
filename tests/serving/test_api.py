"""The official client of OpenAI against the server: what it answers, and that it answers what infer.py answers."""

import asyncio

import openai
import pytest
import torch
from helpers.serving import Running, running_server

from softprompt.generation.model import SoftPromptModel

TEXTS = ["我爱这部电影", "这家酒店太差了", "你好", "What is 2 + 2?", "今天天气很好，我们去公园吧"]
USER = [{"role": "user", "content": TEXTS[0]}]


def test_models_are_the_base_and_its_adapters(server: Running):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["mini", *(f"a{n}" for n in range(8))]
    assert client.models.retrieve("a3").id == "a3"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("a9")
    assert raised.value.code == "model_not_found"


def test_an_answer_is_the_one_of_infer(server: Running):
    for name, text in (("a0", TEXTS[0]), ("a1", TEXTS[1]), ("mini", TEXTS[2])):
        expected = server.model.generate(
            text, adapter=name if name != "mini" else "none", do_sample=False, max_new_tokens=12
        )
        got = server.client().chat.completions.create(
            model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=12
        )
        (choice,) = got.choices
        assert (choice.message.content, choice.message.role) == (expected, "assistant")
        assert got.object == "chat.completion" and got.model == name and got.id.startswith("chatcmpl-")
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
        assert choice.finish_reason == "length" or got.usage.completion_tokens < 12


def test_32_answers_of_eight_adapters_are_those_that_each_gets_alone(server: Running):
    asked = [(f"a{n % 8}", TEXTS[n % 5] * (1 + n % 3)) for n in range(32)]
    expected = [server.model.generate(text, adapter=name) for name, text in asked]

    async def ask_all() -> list[str]:
        async with server.async_client() as client:
            answers = [
                client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}])
                for name, text in asked
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    assert asyncio.run(ask_all()) == expected
    assert len(set(expected)) > 8


def test_a_stream_has_the_chunks_of_openai(server: Running):
    whole = server.client().chat.completions.create(model="a1", messages=USER)
    chunks = list(server.client().chat.completions.create(model="a1", messages=USER, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and not deltas[0].content
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"] and deltas[-1].content is None
    assert len(chunks) > 3 and all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_usage_if_asked_and_with_done(server: Running):
    client = server.client()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model="a1", messages=USER, **options)
    assert not last.choices and last.usage == client.chat.completions.create(model="a1", messages=USER).usage
    assert all(chunk.usage is None for chunk in chunks)
    raw = server.post("/v1/chat/completions", {"model": "a1", "messages": USER, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])


def test_completions_take_texts_and_tokens_without_a_template(server: Running):
    client, tokenizer = server.client(), server.model.tokenizer
    texts = ["Human: 你好\n\nAssistant: ", "Human: 你们好\n\nAssistant: "]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    each = [client.completions.create(model="a2", prompt=text, max_tokens=9).choices[0].text for text in texts]
    assert each[0].strip() == server.model.generate("你好", adapter="a2", max_new_tokens=9)
    for prompt in (texts, ids):
        got = client.completions.create(model="a2", prompt=prompt, max_tokens=9)
        assert [choice.text for choice in got.choices] == each and got.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model="a2", prompt=ids[0], max_tokens=9)
    assert one.choices[0].text == each[0] and one.object == "text_completion"
    streamed = ["", ""]
    for chunk in client.completions.create(model="a2", prompt=texts, max_tokens=9, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == each
    assert client.completions.create(model="a2", prompt=texts[0]).usage.completion_tokens == 16  # OpenAI's default


def test_n_and_seed(server: Running):
    settings = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 8, "seed": 5}
    expected = server.model.generate(
        TEXTS[0],
        adapter="a1",
        temperature=0.9,
        top_p=0.95,
        max_new_tokens=8,
        seed=5,
        num_return_sequences=3,
        do_sample=True,
    )
    got = server.client().chat.completions.create(model="a1", messages=USER, n=3, **settings)
    assert [choice.message.content for choice in got.choices] == expected and len(set(expected)) > 1
    assert [choice.index for choice in got.choices] == [0, 1, 2] and got.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in server.client().chat.completions.create(model="a1", messages=USER, n=3, stream=True, **settings):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected
    assert server.ask("a1", TEXTS[0], temperature=1, seed=-1) == server.ask("a1", TEXTS[0], temperature=1, seed=-1)
    assert len({server.ask("a1", TEXTS[0], temperature=2) for _ in range(3)}) > 1


@pytest.mark.parametrize("name", ["a0", "a3"])
def test_a_stop_string_ends_an_answer_and_is_left_out(name: str, server: Running):
    whole = server.client().completions.create(model=name, prompt=TEXTS[4], max_tokens=40).choices[0].text
    for at, length in ((3, 1), (5, 4), (len(whole) // 2, 7)):  # within a token, and across several
        stop = whole[at : at + length]
        expected = whole[: whole.index(stop)]
        for stops in (stop, ["never in it", stop]):
            got = server.client().completions.create(model=name, prompt=TEXTS[4], max_tokens=40, stop=stops)
            assert (got.choices[0].text, got.choices[0].finish_reason) == (expected, "stop")
        stream = server.client().completions.create(model=name, prompt=TEXTS[4], max_tokens=40, stop=stop, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == expected and chunks[-1].finish_reason == "stop"


@torch.no_grad()
def test_logprobs_are_those_of_the_base(server: Running):
    model, client = server.model, server.client()
    ids = model.tokenizer("你好", add_special_tokens=False)["input_ids"]
    got = client.completions.create(model="a2", prompt=ids, max_tokens=3, logprobs=2, temperature=0).choices[0].logprobs
    words = model.base.get_input_embeddings()
    row = torch.cat([model.adapters["a2"].prompt, words(torch.tensor(ids))])
    for number, (shown, logprob) in enumerate(zip(got.tokens, got.token_logprobs, strict=True)):
        scores = model.base(inputs_embeds=row[None]).logits[0, -1].float().log_softmax(-1)
        allowed = scores.clone()
        allowed[model.tokenizer.eos_token_id] = -torch.inf
        chosen = int(allowed.argmax())
        assert logprob == pytest.approx(scores[chosen].item(), abs=1e-3)
        best = sorted(got.top_logprobs[number].values(), reverse=True)
        assert best == pytest.approx(scores.topk(2).values.tolist(), abs=1e-3)
        assert shown.startswith("bytes:") or shown == model.tokenizer.decode([chosen])
        row = torch.cat([row, words(torch.tensor([chosen]))])
    assert got.text_offset[0] == 0 and len(got.tokens) == 3


def test_logprobs_of_a_chat(server: Running):
    settings = {"model": "a1", "messages": USER, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    got = server.client().chat.completions.create(**settings)
    content = got.choices[0].logprobs.content
    assert len(content) == 6 and all(len(each.top_logprobs) == 3 for each in content)
    text = b"".join(bytes(each.bytes) for each in content).decode(errors="replace")
    assert text.strip() == got.choices[0].message.content
    streamed = server.client().chat.completions.create(**settings, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for part in parts if part for token in part.content] == content
    assert server.client().chat.completions.create(model="a1", messages=USER).choices[0].logprobs is None


def test_classify_gives_the_probabilities_of_infer(server: Running):
    choices = ["正面", "负面", "没有"]
    expected = server.model.classify(TEXTS[:2], choices, adapter="a0")
    got = server.post("/v1/classify", {"model": "a0", "input": TEXTS[:2], "choices": choices}).json()
    for one, result in zip(got["data"], expected, strict=True):
        assert one["label"] == result.label and one["probability"] == pytest.approx(result.probability)
        found = {each["choice"]: each["probability"] for each in one["choices"]}
        assert found == pytest.approx(result.probabilities)
    one = server.post("/v1/classify", {"model": "a0", "messages": USER, "choices": choices}).json()
    assert one["data"] == [got["data"][0]] and one["usage"]["prompt_tokens"] > 0


def test_a_conversation_is_rendered_as_in_training(server: Running):
    turns = [("user", TEXTS[0]), ("assistant", "正面"), ("user", TEXTS[1])]
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = server.model.generate({"messages": messages}, adapter="a0")
    got = server.client().chat.completions.create(model="a0", messages=messages)
    assert got.choices[0].message.content == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]
    assert server.client().chat.completions.create(model="a0", messages=parts).choices[0].message.content == server.ask(
        "a0", TEXTS[0]
    )


SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "hello"}
WITHOUT_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '\n' }}{% endfor %}{{ '> ' }}"


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_a_llama_answers_with_either_engine(engine, llama):
    model = SoftPromptModel.from_pretrained(
        llama / "base", {name: llama / "runs" / name for name in ("chat", "default")}, engine=engine
    )
    expected = {name: model.generate("hello", adapter=name) for name in ("chat", "default")}
    with running_server(model, llama / "runs", batch_size=4) as server:
        assert {name: server.ask(name, "hello") for name in expected} == expected
        asked = {"model": "chat", "messages": [SYSTEM, HELLO]}
        with_system = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]["content"]
        assert with_system == model.generate({"messages": [SYSTEM, HELLO]}, adapter="chat")
        assert server.client().chat.completions.create(model="base", messages=[SYSTEM, HELLO], max_tokens=3).choices


def test_a_system_message_without_a_place_is_refused(llama, server: Running):
    def refused(running: Running, model: str) -> str:
        got = running.post("/v1/chat/completions", {"model": model, "messages": [SYSTEM, HELLO]})
        assert got.status_code == 400 and got.json()["error"]["param"] == "messages"
        return got.json()["error"]["message"]

    assert "system" in refused(server, "a0")
    model = SoftPromptModel.from_pretrained(llama / "base", "none")
    with running_server(model, llama / "runs") as of_llama:
        assert "system" in refused(of_llama, "default")
        model.tokenizer.chat_template = WITHOUT_SYSTEM  # leaves system messages out without an error
        assert "system" in refused(of_llama, "chat")
        assert of_llama.ask("chat", "hello") is not None
