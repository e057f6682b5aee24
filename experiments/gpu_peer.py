"""Part of the GPU suite: the same shapes under Hugging Face accelerate's CPU offload."""

import time
from collections.abc import Iterator
from typing import Any

from experiments.gpu_common import median


def peer(sizes: Any) -> Iterator[dict]:
    """Time per token with every weight moved for every token; fewer layers than the model has."""
    import torch
    from accelerate import cpu_offload
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers = sizes.pick(6, 1)
    config = Qwen3MoeConfig(
        vocab_size=sizes.pick(151936, 256),
        hidden_size=sizes.pick(2048, 64),
        num_hidden_layers=layers,
        num_attention_heads=sizes.pick(32, 2),
        num_key_value_heads=sizes.pick(4, 1),
        head_dim=sizes.pick(128, 32),
        moe_intermediate_size=sizes.pick(768, 64),
        num_experts=sizes.pick(128, 8),
        num_experts_per_tok=sizes.pick(8, 2),
        norm_topk_prob=True,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).eval()
    model = model.to("cpu")
    model = cpu_offload(model, execution_device=torch.device(device))
    token, samples, cache = torch.zeros((1, 1), dtype=torch.long, device=device), [], None
    with torch.no_grad():
        for _ in range(sizes.pick(6, 2)):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if device == "cuda":
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
    milliseconds = median(samples[1:]) * 1e3
    yield {
        "peer": "accelerate cpu_offload",
        "layers": layers,
        "ms": milliseconds,
        "ms_for_48_layers": milliseconds * 48 / layers,
        "samples": samples,
    }
