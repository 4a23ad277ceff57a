"""Plain HTTP against a FlowPrefill router, standard library only: SGLang's /generate, whole and streamed.

    flowprefill up &
    python examples/http_client.py --url http://127.0.0.1:30000

The same with curl:

    curl http://127.0.0.1:30000/generate -H 'content-type: application/json' -H 'x-sgl-ttft-slo-ms: 500' \\
      -d '{"text": "Prefill is ", "sampling_params": {"max_new_tokens": 24, "temperature": 0}}'
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen


def post(url: str, body: dict[str, Any], slo_ms: float | None = None) -> Request:
    """A JSON request, with an objective for the time to its first token if one is given."""
    headers = {"content-type": "application/json"}
    if slo_ms is not None:
        headers["x-sgl-ttft-slo-ms"] = str(slo_ms)
    return Request(url, json.dumps(body).encode(), headers)


def generate(url: str, text: str, max_new_tokens: int, slo_ms: float | None = None) -> dict[str, Any]:
    """The whole answer, with SGLang's ``meta_info``."""
    body = {"text": text, "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0}}
    with urlopen(post(f"{url}/generate", body, slo_ms)) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def stream(url: str, text: str, max_new_tokens: int) -> Iterator[str]:
    """The answer so far, each time it grows."""
    body = {"text": text, "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0}, "stream": True}
    with urlopen(post(f"{url}/generate", body)) as response:
        for line in response:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[len(b"data: ") :])["text"]


def main(url: str) -> dict[str, str]:
    """Ask for the same answer whole and streamed; returns both."""
    whole = generate(url, "Prefill is ", 24, slo_ms=500)
    *_, streamed = stream(url, "Prefill is ", 24)
    return {"whole": whole["text"], "streamed": streamed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    for name, text in main(parser.parse_args().url).items():
        print(f"{name}: {text!r}")
