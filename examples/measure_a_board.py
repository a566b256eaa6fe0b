"""What a bundle takes on this board, as one JSON line: python examples/measure_a_board.py BUNDLE"""

import json
import resource
import sys
import time

import edge_gemma
from edge_gemma import Sampling, Tokens

N_PROMPT, N_ANSWER = 256, 32


def main(bundle: str) -> None:
    started_s = time.perf_counter()
    with edge_gemma.load(bundle, n_ctx=1024) as model:
        load_s = time.perf_counter() - started_s
        ids = model.tokenize("The quick brown fox jumps over the lazy dog. " * N_PROMPT)
        prompt = [Tokens(ids[:N_PROMPT])]
        *_, last = model.generate(prompt, Sampling(max_tokens=N_ANSWER, temperature=0))
        figures = {
            "load_s": round(load_s, 2),
            "ttft_s": round(last.timings.ttft_s, 3),
            "prefill_tok_s": round(last.timings.prefill_tok_s, 1),
            "decode_tok_s": last.timings.decode_tok_s and round(last.timings.decode_tok_s, 1),
            "planned_mib": model.plan.total_bytes >> 20,
            # with what loading touched for a moment; `edge-gemma bench` measures PSS after it
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
