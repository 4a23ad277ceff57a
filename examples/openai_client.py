"""The official OpenAI client against a FlowPrefill router: chat, streaming, and a TTFT objective for one request.

flowprefill up &
python examples/openai_client.py --url http://127.0.0.1:30000
"""

import argparse

from openai import OpenAI


def main(url: str) -> dict[str, str]:
    """Ask three times; returns the three answers by name."""
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id

        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "What is a deadline?"}], max_tokens=24, temperature=0
        )

        stream = client.completions.create(model=model, prompt="Prefill is ", max_tokens=24, temperature=0, stream=True)
        streamed = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

        urgent = client.completions.create(
            model=model,
            prompt="Answer within half a second: ",
            max_tokens=8,
            temperature=0,
            extra_headers={"x-sgl-ttft-slo-ms": "500"},
        )
    return {
        "chat": chat.choices[0].message.content or "",
        "streamed": streamed,
        "urgent": urgent.choices[0].text,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    for name, text in main(parser.parse_args().url).items():
        print(f"{name}: {text!r}")
