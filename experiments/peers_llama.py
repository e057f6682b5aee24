"""llama.cpp's side of `peers_cpu`: makes GGUF files and answers requests. Imports no moejax.

Command:   LLAMA_PYTHON experiments/peers_llama.py convert MODEL OUT      (BF16, Q8_0 and Q4_0)
           LLAMA_PYTHON experiments/peers_llama.py serve FILE --threads 2 --context 1024
Needs:     llama-cpp-python and gguf in that Python.
"""

import argparse
import ctypes
import json
import pathlib
import re
import sys
import time

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
# By the quantiser's own defaults, which leave the router alone and give the head more bits.
QUANTISED = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def bf16_tensors(model: pathlib.Path) -> dict[str, np.ndarray]:
    """Bits of every tensor of a safetensors directory, mapped."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        mapped = np.memmap(file, np.uint8, "r")
        length = int(mapped[:8].view(np.uint64)[0])
        for name, entry in json.loads(bytes(mapped[8 : 8 + length])).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", (name, entry)
                first, last = (8 + length + at for at in entry["data_offsets"])
                found[name] = mapped[first:last].view(np.uint16).reshape(entry["shape"])
    return found


def convert(model: pathlib.Path, out: pathlib.Path) -> None:
    """Write BF16.gguf and the quantised files beside it; files that exist are kept."""
    out.mkdir(parents=True, exist_ok=True)
    source = out / "BF16.gguf"
    if not source.exists():
        write_bf16(model, source)
    for name, kind in QUANTISED.items():
        if (out / f"{name}.gguf").exists():
            continue
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = kind
        part = out / f"{name}.part"
        if llama_cpp.llama_model_quantize(
            str(source).encode(), str(part).encode(), ctypes.byref(options)
        ):
            raise SystemExit(f"llama.cpp did not quantise to {name}")
        part.rename(out / f"{name}.gguf")


def write_bf16(model: pathlib.Path, target: pathlib.Path) -> None:
    """A Qwen3-MoE directory as one GGUF without a vocabulary."""
    config, tensors = json.loads((model / "config.json").read_text()), bf16_tensors(model)
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "qwen3moe")
    _metadata(writer, config)
    grouped: dict[str, list[str]] = {}
    for name in sorted(
        tensors, key=lambda n: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", n)]
    ):
        stem = re.sub(r"experts\.\d+\.", "experts.", name.removesuffix(".weight"))
        layer = re.match(r"model\.layers\.(\d+)\.", stem)
        short = NAMES[stem[layer.end() :] if layer else stem]
        grouped.setdefault(f"blk.{layer[1]}.{short}.weight" if layer else f"{short}.weight", [])
        grouped[f"blk.{layer[1]}.{short}.weight" if layer else f"{short}.weight"].append(name)
    kinds = gguf.GGMLQuantizationType
    for name, sources in grouped.items():
        shape = tensors[sources[0]].shape
        if "_exps" in name:
            shape = (len(sources), *shape)
        wide = "norm" in name or "ffn_gate_inp" in name  # as llama.cpp's converter does
        size = int(np.prod(shape)) * (4 if wide else 2)
        kind = kinds.F32 if wide else kinds.BF16
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources in grouped.items():
        bits = np.concatenate([tensors[s].reshape(-1) for s in sources])
        if "norm" in name or "ffn_gate_inp" in name:
            bits = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(bits)
    writer.close()
    part.rename(target)


def _metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


class Model:
    """A loaded GGUF with one sequence."""

    def __init__(self, path: pathlib.Path, threads: int, context: int):
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = False  # repacked weights crash on machines with AMX
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, min(context, 512), 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], first: int, *, every: bool = False) -> np.ndarray:
        """Logits of the last of these tokens, or of every one, whose positions begin at `first`."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(ids) - 1
            if llama_cpp.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            rows = len(ids) if every else 1
            pointer = llama_cpp.llama_get_logits(self.context)
            return np.ctypeslib.as_array(pointer, (rows * self.vocab,)).reshape(rows, self.vocab)
        finally:
            llama_cpp.llama_batch_free(batch)

    def time(self, ids: list[int], new: int) -> dict:
        """Seconds of a prompt (`new` = 1) or of the new tokens after it, and the tokens."""
        self.clear()
        begun = time.perf_counter()
        tokens = [int(self.decode(ids, 0)[-1].argmax())]
        if new > 1:
            begun = time.perf_counter()
        while len(tokens) < new:
            at = len(ids) + len(tokens) - 1
            tokens.append(int(self.decode(tokens[-1:], at)[-1].argmax()))
        return {"seconds": time.perf_counter() - begun, "tokens": tokens}


def weight_bytes(path: pathlib.Path) -> int:
    """Bytes read for one token: every tensor, of the experts the share in use, no embedding."""
    reader = gguf.GGUFReader(path)
    field = "qwen3moe.expert_{}count"
    used, count = (int(reader.get_field(field.format(n)).contents()) for n in ("used_", ""))
    sizes = {t.name: int(t.n_bytes) for t in reader.tensors if t.name != "token_embd.weight"}
    return int(sum(n * used / count if "_exps" in name else n for name, n in sizes.items()))


def serve(path: pathlib.Path, threads: int, context: int) -> None:
    """Answer one JSON request per line; see `peers_cpu.Peer`."""
    model = Model(path, threads, context)
    versions = {"llama_cpp_python": llama_cpp.__version__, "gguf": path.name}
    system = llama_cpp.llama_print_system_info().decode()
    answer = {"versions": versions, "system": system, "weight_bytes": weight_bytes(path)}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "time":
            answer = model.time(request["ids"], request["new"])
        else:
            model.clear()
            np.save(request["out"], model.decode(request["ids"], 0, every=True))
            answer = {}
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Convert or serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert")
    converting.add_argument("model", type=pathlib.Path)
    converting.add_argument("out", type=pathlib.Path)
    serving = commands.add_parser("serve")
    serving.add_argument("file", type=pathlib.Path)
    serving.add_argument("--threads", type=int, default=2)
    serving.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    if options.command == "convert":
        convert(options.model, options.out)
    else:
        serve(options.file, options.threads, options.context)


if __name__ == "__main__":
    main()
