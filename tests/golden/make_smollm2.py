"""Make the golden greedy continuations of the default model, by `transformers` in float32 from the same GGUF.

Run it in an environment with torch (CPU), transformers, gguf and llama-cpp-python (whose tokenizer makes the ids):

    python tests/golden/make_smollm2.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

It writes `tests/golden/smollm2.json`: for each prompt its text, its token ids, 32 greedy tokens, and at each step by
how much the best logit beats the second (a margin near zero is a tie that another order of sums may turn).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM

NEW = 32
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
PROMPTS = {
    "plain": "The history of the bicycle begins in",
    "chat": f"{SYSTEM}<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "digits": "Total:   1\nTotal:   22\nTotal:   333\nTotal:   ",
    "unicode": "Übersetzung: Die Straße ist naß – 日本語のテキスト, emoji 🙂🚲, café.",
    "long": "One morning the lighthouse keeper wrote in his log. " * 12 + "Then",
}


def main(path: Path) -> None:
    """Write the golden file."""
    tokenizer = Llama(str(path), vocab_only=True, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = model.eval()
    rows = []
    for name, text in PROMPTS.items():
        ids = tokenizer.tokenize(text.encode(), add_bos=False, special=True)
        tokens, margins, logits, cache = [], [], None, None
        feed = torch.tensor([ids])
        for _ in range(NEW):
            with torch.no_grad():
                out = model(feed, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1]
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 4))
            feed = best.indices[None, :1]
        rows.append({"name": name, "prompt": text, "ids": ids, "tokens": tokens, "margins": margins})
        print(name, min(margins), tokenizer.detokenize(tokens).decode(errors="replace"))
    target = Path(__file__).parent / "smollm2.json"
    made = {"made_by": "tests/golden/make_smollm2.py", "dtype": "float32", "rows": rows}
    target.write_text(json.dumps(made, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
