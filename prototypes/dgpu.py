import os, sys, time, json
import jax, numpy as np
import kvjax
from experiments import decode as d
from experiments.environment import describe
cfg = d.Config(works=("open", "edit"), prompts=8, new=96, turns=2)
model, params, tok = kvjax.load("/tmp/model.gguf"); print(model.precision, jax.devices(), flush=True)
sampling = kvjax.Sampling(stop=tok.stop_ids); rows = []
def save():
    env = describe(); json.dump({"rows": rows, "environment": env}, open(os.environ["OUT"]+"/decode_gpu.json", "w"), indent=1)
for work in ("open", "edit"):
    for batch in (1, 8):
        t = time.time()
        prompts = [d.ask(tok, work, i) for i in range(8)]
        timings, differing, costs = d.compare(model, params, prompts, batch, {"prompt lookup": d.METHODS["prompt lookup"]}, 96, 2, sampling, lambda x: None)
        for name in timings: rows.append(d.row(name, work, batch, timings, differing[name], costs[name])); print(rows[-1], flush=True)
        print("took", time.time()-t, flush=True); save()
from experiments.decode_batches import trace_rows, sample_rows
t = time.time()
rows += sample_rows(model, params, tok, cfg, 96, 2, lambda *a: None); print(rows[-2:], time.time()-t, flush=True); save()
rows += trace_rows(model, params, tok, cfg, lambda *a: print(*a, round(time.time()-t), flush=True)); print(rows[-4:], time.time()-t, flush=True); save()
