"""OpenAI's own client against a real server: texts, streams, usage, stops, disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from sim.models import tiny_llama
from sim.server import SimServer, metric

from kvist.engine.generation import StopStrings
from kvist.engine.local import LocalEngine, LocalProcess

QUESTION = "Tell me what a block is, and why a page of the pool is the block byte for byte."
LONG = "The index and the arena are shared memory, so a lookup needs no call. " * 12
FLAGS = ("--block-size", "16", "--served-model-name", "tiny", "--cache", "off")
WAIT_SECONDS = 20.0

SMALL = ("--threads", "1", "--kv-cache-memory-bytes", "16MiB")

# A server with another core is one more line here; the tests ask nothing that only one can do.
SERVERS: dict[str, Callable[[Path, Path], LocalProcess]] = {
    "sim": lambda model, log: SimServer(model, log, FLAGS),
    "core": lambda model, log: LocalEngine(str(model), log, (*FLAGS, *SMALL)),
}


@pytest.fixture(scope="module", params=SERVERS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    tiny_llama(folder / "model", 1)
    server = SERVERS[request.param](folder / "model", folder / "log")
    server.start()
    try:
        server.wait_ready()
        yield server.url
        assert server.stop() == 0, server.tail()
        assert "Traceback" not in server.tail(500)
    finally:
        server.stop()


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def complete(client: OpenAI, prompt: str = QUESTION, **more: object) -> Completion:
    """A greedy completion that does not end by itself."""
    extra = {"ignore_eos": True, **dict(more.pop("extra", {}))}  # type: ignore[call-overload]
    settings = {"max_tokens": 24, "temperature": 0, **more}
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        extra_body=extra,
        **settings,  # type: ignore[arg-type]
    )
    assert isinstance(answer, Completion)
    return answer


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_chat_is_answered_with_text_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTION},
        ],
        max_completion_tokens=12,
        extra_body={"ignore_eos": True},
    )
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_text_parts_read_like_one_text(client: OpenAI) -> None:
    def ask(content: object) -> str | None:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=8,
            temperature=0,
        )
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ask(parts) == ask("one\ntwo")


def test_a_stream_holds_the_text_of_the_whole_answer(client: OpenAI) -> None:
    whole = complete(client).choices[0].text
    stream = client.completions.create(
        model="tiny",
        prompt=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_a_chat_stream_begins_with_the_role_and_ends_with_usage_if_asked(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_a_prompt_may_be_text_or_ids_one_or_many(client: OpenAI, url: str) -> None:
    ids = httpx.post(f"{url}/tokenize", json={"prompt": QUESTION}).json()["tokens"]
    alone = complete(client).choices[0].text
    several: list[object] = [[QUESTION, QUESTION], ids, [ids, ids]]
    for prompt, count in zip(several, (2, 1, 2), strict=True):
        answer = complete(client, prompt)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == [alone] * count
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == count * len(ids)


def test_n_answers_come_with_their_numbers_and_count_the_prompt_once(client: OpenAI) -> None:
    one = complete(client)
    answer = complete(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.text for choice in answer.choices} == {one.choices[0].text}
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_a_seed_makes_sampling_repeatable(client: OpenAI) -> None:
    def texts() -> list[str]:
        answer = complete(client, temperature=1.0, seed=7, n=2, max_tokens=12)
        return [choice.text for choice in answer.choices]

    assert texts() == texts()


def test_echo_repeats_the_prompt_before_the_answer(client: OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == QUESTION + plain


def test_completions_are_sixteen_tokens_long_unless_asked(client: OpenAI) -> None:
    answer = complete(client, max_tokens=None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_logprobs_come_one_per_token(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logged = chat.choices[0].logprobs
    assert logged is not None
    assert logged.content is not None
    assert [len(token.top_logprobs) for token in logged.content] == [3] * 5
    assert all(token.logprob <= 0 for token in logged.content)

    text = complete(client, max_tokens=5, logprobs=2).choices[0]
    assert text.logprobs is not None
    assert text.logprobs.tokens is not None
    assert text.logprobs.text_offset is not None
    assert len(text.logprobs.tokens) == 5
    assert text.logprobs.text_offset[0] == 0
    assert text.logprobs.text_offset == sorted(text.logprobs.text_offset)


def test_an_answer_is_cut_before_a_stop_string_wherever_it_lies(client: OpenAI) -> None:
    whole = complete(client, max_tokens=32).choices[0].text
    for place in range(0, len(whole) - 5, 7):
        stop = whole[place : place + 5]
        cut = complete(client, max_tokens=32, stop=["\x00never", stop]).choices[0]
        assert cut.text == whole[: whole.find(stop)]
        assert cut.finish_reason == "stop"
        stream = client.completions.create(
            model="tiny",
            prompt=QUESTION,
            max_tokens=32,
            temperature=0,
            stop=stop,
            stream=True,
            logprobs=0,
            extra_body={"ignore_eos": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_ends_an_answer(client: OpenAI, url: str) -> None:
    text = complete(client).choices[0].text
    ids = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"]
    answer = complete(client, extra={"stop_token_ids": ids})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 24


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), min_size=1),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    finder = StopStrings(stops)
    given, rest, turn = "", text, 0
    while rest and not finder.found:
        size = cuts[turn % len(cuts)]
        given, rest, turn = given + finder.push(rest[:size]), rest[size:], turn + 1
        assert expected.startswith(given)
    if not finder.found:
        given += finder.flush()
    assert given == expected
    assert finder.found == bool(ends)


def test_a_prompt_seen_before_is_counted_as_cached_by_tier(client: OpenAI) -> None:
    def cached(salt: str, cache: str) -> int:
        extra = {"cache_salt": salt, "kv_cache": cache}
        usage = complete(client, LONG, max_tokens=2, extra=extra).usage
        assert usage is not None
        details = usage.prompt_tokens_details
        assert details is not None
        assert details.cached_tokens is not None
        tiers = details.model_dump()["cached_tokens_by_tier"]
        assert set(tiers) == {"hbm", "dram", "flash"}
        assert sum(tiers.values()) == details.cached_tokens < usage.prompt_tokens
        return details.cached_tokens

    assert cached("first", "on") == 0
    assert cached("first", "on") > 0
    assert cached("first", "bypass") == 0
    assert cached("second", "on") == 0


def test_a_client_that_leaves_a_stream_stops_the_core(client: OpenAI, url: str) -> None:
    aborted = metric(url, "vllm:request_success_total")
    stream = client.completions.create(
        model="tiny",
        prompt=QUESTION,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert metric(url, "vllm:num_requests_running") == 1
    stream.close()
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0)
    assert metric(url, "vllm:request_success_total") == aborted + 1


def test_a_client_that_does_not_wait_for_its_answer_stops_the_core(url: str) -> None:
    body = {"prompt": QUESTION, "max_tokens": 2000, "ignore_eos": True, "n": 2}
    generated = metric(url, "vllm:generation_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
    wait_until(lambda: metric(url, "vllm:num_requests_running") == 0)
    assert metric(url, "vllm:generation_tokens_total") < generated + 4000


def test_many_requests_at_once_get_each_its_own_answer(client: OpenAI, url: str) -> None:
    prompts = [f"Question {number}: {QUESTION}" for number in range(12)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:

            async def ask(prompt: str) -> str:
                stream = await many.completions.create(
                    model="tiny",
                    prompt=prompt,
                    max_tokens=24,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*[ask(prompt) for prompt in prompts])

    assert asyncio.run(ask_all()) == alone


def test_the_model_is_listed_with_its_context(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] > 0


def test_tokens_turn_back_into_their_text(url: str) -> None:
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": QUESTION}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    back = httpx.post(f"{url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == QUESTION
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    assert httpx.post(f"{url}/tokenize", json=chat).json()["count"] > tokens["count"]


def test_metrics_count_requests_and_tokens_and_their_sums_agree(client: OpenAI, url: str) -> None:
    names = ("vllm:request_success_total", "vllm:time_to_first_token_seconds_count")
    before = [metric(url, name) for name in names]
    generated = metric(url, "vllm:generation_tokens_total")
    complete(client, max_tokens=9)
    assert [metric(url, name) for name in names] == [count + 1 for count in before]
    assert metric(url, "vllm:generation_tokens_total") == generated + 9
    prompt = metric(url, "vllm:prompt_tokens_total")
    assert prompt == metric(url, "vllm:prompt_tokens_by_source_total")
    assert metric(url, "kvist_engine_queries_tokens_total") == metric(
        url, "kvist_engine_cached_tokens_total"
    ) + metric(url, "kvist_engine_missed_tokens_total")


def test_operators_endpoints_answer(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/ping").status_code == 200
    assert httpx.get(f"{url}/version").json()["version"]
