"""openai's client against a real server on the demo model."""

import asyncio
import json
import math
import re
from http.client import HTTPConnection

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from e2e_server import PARIS, STORY
from server_process import until

pytestmark = pytest.mark.model


def complete(client, messages=PARIS, **fields):
    fields = {"model": "default", "temperature": 0, "max_tokens": 24} | fields
    return client.chat.completions.create(messages=messages, **fields)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def test_an_answer(client):
    completion = complete(client)
    assert "Paris" in text_of(completion)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "default"
    usage = completion.usage
    assert usage.prompt_tokens > 10 and 5 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert completion._request_id


def test_a_stream_is_the_answer_in_pieces(client):
    """A long one: the pieces of an answer that is ready before it is sent are joined."""
    long = {"messages": STORY, "max_tokens": 100}
    whole = complete(client, **long)
    chunks = list(complete(client, **long, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(piece or "" for piece in pieces) == text_of(whole)
    assert len([piece for piece in pieces if piece]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_cuts_with_length(client):
    for field in ("max_tokens", "max_completion_tokens"):
        completion = complete(client, **{"max_tokens": None, field: 3})
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.completion_tokens == 3


def test_stop_cuts_before_the_string(client):
    whole = text_of(complete(client))
    completion = complete(client, stop=["is Par", "nowhere"])
    assert text_of(completion) == whole[: whole.index("is Par")]
    assert completion.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta.content for chunk in complete(client, stop="is Par", stream=True)]
    assert "".join(piece or "" for piece in pieces) == text_of(completion)


def test_a_conversation_goes_on(client):
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "My name is Zanzibar."},
        {"role": "assistant", "content": "Hello, Zanzibar."},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Zanzibar" in text_of(complete(client, messages))


def test_a_second_turn_is_cached(client):
    messages = [{"role": "user", "content": "Tell me about kangaroos. " * 20}]
    first = complete(client, messages, max_tokens=40)
    messages += [{"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "Go on."}]
    second = complete(client, messages)
    cached = [completion.usage.prompt_tokens_details.cached_tokens for completion in (first, second)]
    assert cached[0] < 30  # the template's own beginning, which other requests share
    assert first.usage.prompt_tokens < cached[1] < second.usage.prompt_tokens
    stream = complete(client, messages, stream=True, stream_options={"include_usage": True})
    *_, last = stream
    assert last.usage.prompt_tokens_details.cached_tokens > cached[1]


def test_models_are_listed_under_the_names_that_are_taken(client):
    [model] = client.models.list().data
    assert model.id == "demo"
    assert complete(client, model="demo", max_tokens=1).model == "demo"
    with pytest.raises(NotFoundError) as error:
        complete(client, model="gpt-4o")
    assert error.value.code == "model_not_found"
    assert "demo" in error.value.message


def test_a_wrong_field_is_named(client):
    with pytest.raises(BadRequestError) as error:
        complete(client, temperature=9)
    assert error.value.param == "temperature"
    with pytest.raises(BadRequestError) as error:
        complete(client, [{"role": "user", "content": 7}])
    assert error.value.param == "messages[0].content"


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(client):
    with pytest.raises(BadRequestError) as error:
        complete(client, [{"role": "user", "content": "word " * 9000}])
    assert error.value.code == "context_length_exceeded"
    assert "8192" in error.value.message.replace(",", "")


def test_a_seed_gives_the_same_text_alone_and_in_company(server, client):
    sampled = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20}
    alone = [text_of(complete(client, STORY, seed=seed, **sampled)) for seed in (1, 2)]
    assert alone[0] != alone[1]

    async def together():
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as company:
            unseeded = [complete(company, PARIS, temperature=1.5, max_tokens=30) for _ in range(3)]
            seeded = [complete(company, STORY, seed=seed, **sampled) for seed in (1, 2, 1)]
            return (await asyncio.gather(*unseeded, *seeded))[3:]

    assert [text_of(completion) for completion in asyncio.run(together())] == [alone[0], alone[1], alone[0]]


def test_requests_that_join_and_leave_do_not_change_each_other(client):
    lengths = [4, 40, 9, 25, 1, 15]
    alone = [text_of(complete(client, STORY, max_tokens=length)) for length in lengths]

    async def streamed(company, length, delay_of):
        if delay_of is not None:
            await delay_of.wait()  # joins when the longest one is on its way
        stream = await complete(company, STORY, max_tokens=length, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if length == max(lengths) and text:
                begun.set()
        return text

    async def together():
        async with AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as company:
            tasks = [streamed(company, length, None if length == max(lengths) else begun) for length in lengths]
            return await asyncio.gather(*tasks)

    begun = asyncio.Event()
    assert asyncio.run(together()) == alone


def test_a_client_that_leaves_ends_its_work(server, client):
    cancelled = server.err.count(" cancelled")
    stream = complete(client, STORY, max_tokens=8000, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    stream.close()
    until(lambda: server.err.count(" cancelled") == cancelled + 1, "the stream's request is cancelled")

    steps = server.err.count(" engine: step")
    url = client.base_url
    connection = HTTPConnection(url.host, url.port, timeout=60)
    body = {"model": "default", "messages": STORY, "max_tokens": 8000, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    # More steps than can still be in flight for the stream.
    until(lambda: server.err.count(" engine: step") > steps + 5, "the engine is at work on it")
    connection.close()
    until(lambda: server.err.count(" cancelled") == cancelled + 2, "the request without a stream is cancelled")


def test_nothing_but_the_public_port_listens(server):
    listening = {
        connection.laddr.port
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening == {int(server.url().rpartition(":")[2])}


def test_no_prompt_and_no_answer_is_logged(server, client):
    complete(client, [{"role": "user", "content": "Say kumquat."}])
    until(lambda: re.search(r"POST /v1/chat/completions 200", server.err), "the access log's line")
    assert "kumquat" not in server.err.lower()
    assert "Paris" not in server.err


def test_embeddings_of_a_batch_are_those_of_single_texts(client):
    texts = ["The cat sat on the mat.", "A feline rested on the rug.", "Interest rates went up again."]
    batch = client.embeddings.create(model="default", input=texts)
    assert batch.usage.prompt_tokens > 15
    for item, text in zip(batch.data, texts, strict=True):
        single = client.embeddings.create(model="default", input=text, encoding_format="float").data[0].embedding
        assert len(single) == 576
        assert abs(math.hypot(*single) - 1) < 1e-4
        assert math.dist(item.embedding, single) < 1e-4
