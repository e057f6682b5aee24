"""The sides of `peers_cpu` that run in this Python: moejax and transformers.

Command:   started by `experiments.peers_cpu` with one JSON argument: name, model and load options
"""

import json
import sys
import time
from typing import Any, Protocol

import numpy as np


class Model(Protocol):
    """What a worker serves; see `peers_cpu.Peer`."""

    about: dict[str, Any]

    def time(self, ids: list[int], new: int) -> dict[str, Any]: ...

    def logits(self, ids: list[int]) -> np.ndarray: ...


class Moejax:
    """moejax through the loop that `moejax bench` times."""

    def __init__(self, model: str, load: dict[str, Any]):
        import moejax
        from moejax import bench, doctor

        self.bench = bench
        self.runtime = moejax.load(model, **{k: v for k, v in load.items() if v is not None})
        self.runtime.warm_up(sampling={"temperature": 0.0})
        config, store = self.runtime.config, self.runtime.store
        experts = config.num_moe_layers * config.top_k * store.layout.weight_bytes
        self.about = {
            "versions": doctor.versions(),
            "weight_bytes": bench.dense_bytes_read(self.runtime) + experts,
            "slots": self.runtime.slots,
        }

    def time(self, ids: list[int], new: int) -> dict[str, Any]:
        test = self.bench.Test("", len(ids), new)
        sample = self.bench.run_once(self.runtime, test, np.array([ids], np.int32))
        return {"seconds": sample.seconds, "tokens": sample.tokens[0]}

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.runtime.logits(np.array([ids]))[0]


class Transformers:
    """transformers in bfloat16, a greedy loop over its forward pass."""

    def __init__(self, model: str, load: dict[str, Any]):
        import torch
        import transformers

        from moejax.measure import cores

        del load
        self.torch = torch
        torch.set_num_threads(cores())
        torch.set_grad_enabled(False)
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.model.eval()
        config = self.model.config
        sizes = {name: p.nbytes for name, p in self.model.named_parameters()}
        share = config.num_experts_per_tok / config.num_experts
        read = {name: n for name, n in sizes.items() if "embed_tokens" not in name}
        self.about = {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "weight_bytes": int(sum(n * share if ".experts." in k else n for k, n in read.items())),
            "threads": torch.get_num_threads(),
            "experts": getattr(config, "_experts_implementation", None),
        }

    def _forward(self, ids: list[int], past: Any = None, keep: int = 1) -> Any:
        tokens = self.torch.tensor([ids])
        return self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=keep)

    def time(self, ids: list[int], new: int) -> dict[str, Any]:
        begun = time.perf_counter()
        out = self._forward(ids)
        tokens = [int(out.logits[0, -1].argmax())]
        if new > 1:
            begun = time.perf_counter()
        while len(tokens) < new:
            out = self._forward(tokens[-1:], out.past_key_values)
            tokens.append(int(out.logits[0, -1].argmax()))
        return {"seconds": time.perf_counter() - begun, "tokens": tokens}

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._forward(ids, keep=0).logits[0].float().numpy()


def main() -> None:
    """Answer one JSON request per line of stdin."""
    what = json.loads(sys.argv[1])
    kind = Moejax if what["name"].startswith("moejax") else Transformers
    model: Model = kind(what["model"], what["load"])
    print(json.dumps(model.about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["op"] == "time":
            answer = model.time(request["ids"], request["new"])
        else:
            np.save(request["out"], model.logits(request["ids"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
