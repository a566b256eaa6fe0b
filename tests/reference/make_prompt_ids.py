"""How prompt-ids.json was made: the conversations of ../prompts.py through transformers' tokenizer
with the real Gemma 3 vocabulary.

    PYTHONPATH=tests python tests/reference/make_prompt_ids.py GGUF OUT

GGUF is the file of the `sample` extra (any Gemma 3 text model); OUT gets prompt-ids.json, and it is
printed which conversations differ from the stored ones. Needs what transformers_models.py says,
and gguf. transformers renders the template and makes the ids; what an image and a clip become in
the text is written here as its processors write it (Gemma3Processor, Gemma3nProcessor).

Soft tokens are no ids: a run of n is stored as ["I", n] (image) or ["A", n] (audio), and the end of
audio, which has no row in this vocabulary either, as ["E", 1].
"""

import json
import sys
from itertools import groupby
from pathlib import Path

from prompts import CONVERSATIONS, TEMPLATE
from transformers_models import REFERENCE, stand_in_for_torchvision

# tokens that stand for the rows that this vocabulary has not; no conversation holds them
IMAGE, AUDIO, END_OF_AUDIO = "<unused1>", "<unused2>", "<unused3>"
LETTERS = {IMAGE: "I", AUDIO: "A", END_OF_AUDIO: "E"}
N_IMAGE, N_AUDIO = 3, 188
# <start_of_audio> is Gemma 3n's name for the id that Gemma 3 calls <end_of_image>
EXPANDED = {
    "<start_of_image>": f"\n\n<start_of_image>{IMAGE * N_IMAGE}<end_of_image>\n\n",
    "<audio_soft_token>": f"\n\n<end_of_image>{AUDIO * N_AUDIO}{END_OF_AUDIO}\n\n",
}


def content_of(content: str | list[str]):
    """As processors are given it: text, or a list of items."""
    if isinstance(content, str):
        return content
    media = {"@image": {"type": "image"}, "@audio": {"type": "audio"}}
    return [media.get(item, {"type": "text", "text": item}) for item in content]


def ids_of(tokenizer, turns: list[dict]) -> list:
    messages = [turn | {"content": content_of(turn["content"])} for turn in turns]
    text = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    for marker, expanded in EXPANDED.items():
        text = text.replace(marker, expanded)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = {tokenizer.convert_tokens_to_ids(token): name for token, name in LETTERS.items()}
    result: list = []
    for token, run in groupby(ids):
        n = len(list(run))
        result += [[letters[token], n]] if token in letters else [token] * n
    return result


if __name__ == "__main__":
    gguf, out = Path(sys.argv[1]), Path(sys.argv[2])
    stand_in_for_torchvision()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    stored = json.loads((REFERENCE / "prompt-ids.json").read_text())
    made = [
        {"name": name, "ids": ids_of(tokenizer, turns)} for name, turns in CONVERSATIONS.items()
    ]
    for old, new in zip(stored, made, strict=True):
        print(f"{new['name']:12} {len(new['ids']):3} {'equal' if old == new else 'differs'}")
    (out / "prompt-ids.json").write_text(json.dumps(made))
