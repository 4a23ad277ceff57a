"""The clients that people have, unmodified: the official ``openai`` package and SGLang's frontend language."""

from typing import Any

import pytest

from flowprefill_testing.clusters import Cluster, wait_until
from flowprefill_testing.http import get

pytestmark = pytest.mark.cluster


@pytest.fixture
def client(cluster: Cluster):
    import openai

    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def model(cluster: Cluster) -> str:
    _, document = get(f"{cluster.url}/v1/models")
    (entry,) = document["data"]
    return entry["id"]


def test_chat(client, model: str) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16)
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens == 16
    pieces = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16, stream=True)
    contents = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert len(contents) > 1
    assert "".join(contents) == whole.choices[0].message.content


def test_completions(client, model: str, stock_url: str) -> None:
    import openai

    arguments = {"model": model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}
    ours = client.completions.create(**arguments)
    with openai.OpenAI(base_url=f"{stock_url}/v1", api_key="none", timeout=120) as stock_client:
        stock = stock_client.completions.create(**arguments)
    assert ours.choices[0].text == stock.choices[0].text
    assert ours.usage.prompt_tokens == stock.usage.prompt_tokens
    streamed = client.completions.create(**arguments, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed if piece.choices) == ours.choices[0].text


def test_several_prompts_and_several_samples(client, model: str) -> None:
    several = client.completions.create(model=model, prompt=["one", "two", "three"], temperature=0, max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    samples = client.completions.create(model=model, prompt="one", n=3, temperature=0, max_tokens=4)
    assert {choice.text for choice in samples.choices} == {several.choices[0].text}


def test_an_unknown_model_is_a_404_of_the_client(client) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)
    assert "no-such-model" in str(caught.value)


def test_frontend_language(cluster: Cluster) -> None:
    import sglang as sgl

    backend = sgl.RuntimeEndpoint(cluster.url)
    sgl.set_default_backend(backend)

    @sgl.function
    def program(s, name):
        s += f"My name is {name}."
        s += sgl.gen("greeting", max_tokens=8, temperature=0)
        branches = s.fork(2)
        for number, branch in enumerate(branches):
            branch += f" Branch {number}:"
            branch += sgl.gen("word", max_tokens=6, temperature=0)
        s += branches[0]["word"] + branches[1]["word"]
        s += " The answer is " + sgl.select("answer", choices=["yes", "no", "perhaps"])

    result = program.run(name="Ada")
    assert len(result["greeting"]) == 8
    assert result["answer"] in ("yes", "no", "perhaps")
    again = program.run(name="Ada")
    assert (again["greeting"], again["answer"]) == (result["greeting"], result["answer"])

    streamed = program.run(name="Ada", stream=True)
    text = "".join(streamed.text_iter(var_name="greeting"))
    assert text == result["greeting"]
    assert result["answer"] in "".join(streamed.text_iter())  # to the program's end: until then the cache is in use
    assert streamed["answer"] == result["answer"]
    wait_until(lambda: is_flushed(backend), timeout_s=30)


def is_flushed(backend: Any) -> bool:
    """False while a server is still putting its last request away."""
    try:
        backend.flush_cache()
    except RuntimeError as error:
        if "Flush cache failed" not in str(error):
            raise
        return False
    return True
