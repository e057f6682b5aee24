"""Prints by how much loading or converting a model raises the peak of resident memory.

Arguments: a directory to work in; "write", "load" or "convert"; "int8" or "int4" to quantise.
"""

import json
import re
import sys
from pathlib import Path

from ckpt_models import Model

from moejax.checkpoints.convert import convert_directory
from moejax.checkpoints.hf import load
from moejax.formats import quant_format

MODEL = Model(moe=(True,) * 4, experts=40, width=512, expert_width=128)
directory, action, quant = Path(sys.argv[1]), sys.argv[2], (*sys.argv, None)[3]
if action == "write":
    MODEL.write(directory / "source", shards=8)
    sys.exit()


def resident(field: str) -> int:
    """VmRSS: bytes now; VmHWM: their peak (ru_maxrss is inherited from the parent process)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


WEIGHTS = MODEL.weights.quantised(quant_format(quant))
load(
    Model().write(directory / "small"), Model().weights.quantised(WEIGHTS.quant)
)  # what is imported late
before = resident("VmRSS")
if action == "load":
    loaded = load(directory / "source", WEIGHTS)
else:
    convert_directory(directory / "source", directory / "target", MODEL.weights, quant=quant)
after = resident("VmHWM")
sizes = [path.stat().st_size for path in (directory / "source").glob("*.safetensors")]
print(json.dumps({"peak": after - before, "model": sum(sizes), "shard": max(sizes)}))
