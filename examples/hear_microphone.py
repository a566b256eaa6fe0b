"""Talk with a bundle that hears, or let it hear a sound file:
python examples/hear_microphone.py BUNDLE [FILE]

The audio encoder and the prompt's prefill run while you speak; Ctrl-C ends.
"""

import sys

import edge_gemma
from edge_gemma import Listener, ListenOptions, Microphone, Sampling

OPTIONS = ListenOptions(sampling=Sampling(max_tokens=128))


def main(bundle: str, file: str | None = None) -> None:
    with (
        edge_gemma.load(bundle, n_ctx=2048) as model,
        model.chat(system="You are a voice assistant. Answer in one sentence.") as chat,
    ):
        for record in Listener(chat, file or Microphone(), OPTIONS).records():
            if record.kind == "ready":
                print(f"listening to {record.text}")
            elif record.kind == "text":
                print(record.text, end="", flush=True)
            elif record.kind == "turn":
                print(f"\n({record.wait_s:.2f} s from your last word to the first of the answer)")
            elif record.kind in ("lost", "back", "failed"):
                print(record.text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print()
