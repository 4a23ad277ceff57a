"""SGLang's frontend language against a FlowPrefill router: gen, select, fork and stream.

flowprefill up &
python examples/frontend_language.py --url http://127.0.0.1:30000
"""

import argparse

import sglang as sgl


@sgl.function
def review(s, text):  # type: ignore[no-untyped-def]  # the decorator gives it its types
    """Sort a text, then look at it from two sides at once; both sides share the prompt's prefix."""
    s += "Text: " + text + "\n"
    s += "Mood: " + sgl.select("mood", ["good", "bad", "mixed"]) + "\n"
    sides = s.fork(2)
    for side, word in zip(sides, ("For", "Against"), strict=True):
        side += word + ": " + sgl.gen("argument", max_tokens=16, temperature=0)
    s += "For: " + sides[0]["argument"] + "\nAgainst: " + sides[1]["argument"] + "\n"
    s += "In short: " + sgl.gen("summary", max_tokens=16, temperature=0)


def main(url: str) -> dict[str, str]:
    """Run the program, then run it again as a stream; returns what it found."""
    backend = sgl.RuntimeEndpoint(url)
    text = "The queue was short and the answer came at once."
    state = review.run(text=text, backend=backend)
    streaming = review.run(text=text, backend=backend, stream=True)
    streamed = "".join(streaming.text_iter("summary"))
    return {"mood": state["mood"], "summary": state["summary"], "streamed": streamed, "text": state.text()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    for name, value in main(parser.parse_args().url).items():
        print(f"{name}: {value!r}")
