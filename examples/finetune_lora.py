"""Fine-tune with LoRA, then run the adapter: finetune_lora.py CHECKPOINT OUT [STEPS]. Needs torch,
peft and trl beside edge-gemma (pip install torch peft trl); a CPU will do.
"""

import subprocess
import sys

import edge_gemma
from edge_gemma import Sampling

QUESTION, ANSWER = "What is the capital of France?", "It is Paris."


def train(checkpoint: str, adapter: str, n_steps: int) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    data = Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]}])
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "o_proj", "down_proj"])
    options = SFTConfig(adapter, max_steps=n_steps, learning_rate=1e-2, use_cpu=True)
    trainer = SFTTrainer(checkpoint, args=options, train_dataset=data, peft_config=lora)
    trainer.train()
    trainer.save_model(adapter)


def main(checkpoint: str, out: str, n_steps: str = "20") -> None:
    adapter, bundle = f"{out}/adapter", f"{out}/bundle"
    train(checkpoint, adapter, int(n_steps))
    for command in (["convert", checkpoint], ["convert-lora", adapter, checkpoint]):
        made = bundle if command[0] == "convert" else f"{adapter}.gguf"
        subprocess.run([sys.executable, "-m", "edge_gemma", *command, made], check=True)
    with edge_gemma.load(bundle, lora=[(f"{adapter}.gguf", 1.0)]) as model:
        print("".join(c.text for c in model.chat().send(QUESTION, Sampling(temperature=0))))


if __name__ == "__main__":
    main(*sys.argv[1:])
