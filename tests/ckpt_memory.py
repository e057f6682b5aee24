"""Prints by how much loading or converting a model raises the peak of resident memory."""

import json
import re
import sys
from pathlib import Path

from ckpt_models import Model

from moejax.checkpoints.convert import convert_directory
from moejax.checkpoints.hf import load

MODEL = Model(moe=(True,) * 4, experts=40, width=512, expert_width=128)
directory, action = Path(sys.argv[1]), sys.argv[2]
if action == "write":
    MODEL.write(directory / "source", shards=8)
    sys.exit()


def resident(field: str) -> int:
    """VmRSS: bytes now; VmHWM: their peak (ru_maxrss is inherited from the parent process)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


load(Model().write(directory / "small"), Model().weights)  # what is imported late
before = resident("VmRSS")
if action == "load":
    loaded = load(directory / "source", MODEL.weights)
else:
    convert_directory(directory / "source", directory / "target", MODEL.weights)
after = resident("VmHWM")
sizes = [path.stat().st_size for path in (directory / "source").glob("*.safetensors")]
print(json.dumps({"peak": after - before, "model": sum(sizes), "shard": max(sizes)}))
