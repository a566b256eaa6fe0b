"""Ask about pictures, with a bundle that sees:
python examples/describe_picture.py BUNDLE PICTURE... "QUESTION"
"""

import sys

import edge_gemma
from edge_gemma import Image, PlanRequest, Sampling


def main(bundle: str, *words: str) -> None:
    *pictures, question = words
    request = PlanRequest(senses=("vision",))  # an audio encoder is not loaded
    with edge_gemma.load(bundle, request=request) as model, model.chat() as chat:
        parts = [*map(Image, pictures), question]
        for chunk in chat.send(parts, Sampling(max_tokens=200, temperature=0)):
            print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
