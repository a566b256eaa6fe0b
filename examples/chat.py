"""Talk with a bundle, line by line: python examples/chat.py BUNDLE"""

import sys

import edge_gemma
from edge_gemma import Sampling


def main(bundle: str) -> None:
    with (
        edge_gemma.load(bundle, n_ctx=2048) as model,
        model.chat(system="Answer in one sentence.") as chat,
    ):
        print("> ", end="", flush=True)
        for line in sys.stdin:
            for chunk in chat.send(line.strip(), Sampling(max_tokens=128)):
                print(chunk.text, end="", flush=True)
            print("\n> ", end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
