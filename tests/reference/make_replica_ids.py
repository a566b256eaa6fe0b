"""How replica-ids.json was made: text conversations through transformers' tokenizer with the small
vocabulary of this folder and the chat template of ../prompts.py.

    PYTHONPATH=tests python tests/reference/make_replica_ids.py OUT

OUT gets replica-ids.json, and it is printed which conversations differ from the stored ones. Needs
transformers 5.24, without torch. The vocabulary is tokenizer.json, read by transformers' own class.
"""

import json
import sys
from pathlib import Path

from prompts import CONVERSATIONS, TEMPLATE
from transformers import PreTrainedTokenizerFast

REFERENCE = Path(__file__).parent
TEXT = ("one turn", "white space", "system", "unicode", "code")


if __name__ == "__main__":
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(REFERENCE / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>"
    )
    stored_path, made = REFERENCE / "replica-ids.json", {}
    stored = json.loads(stored_path.read_text()) if stored_path.is_file() else {}
    for name in TEXT:
        text = tokenizer.apply_chat_template(
            CONVERSATIONS[name], chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
        )
        made[name] = tokenizer(text, add_special_tokens=False)["input_ids"]
        verdict = "equal" if stored.get(name) == made[name] else "differs"
        print(f"{name:12} {len(made[name]):3} {verdict}")
    (Path(sys.argv[1]) / "replica-ids.json").write_text(json.dumps(made) + "\n")
