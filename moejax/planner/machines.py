"""What machines can do, for plans and replays: presets by published figures, or measured ones."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from moejax.errors import InputError, unreadable
from moejax.hardware import Hardware
from moejax.units import parse_bytes

SERVER = pathlib.Path(__file__).with_name("server_2core.json")
KINDS = ("gpu", "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates and sizes of one machine; a rate is 1e9 bytes per second, a size bytes.

    Rates are nominal, and `reached` says which share of each arrives: from what is usual to
    reach, or 1 where the rate itself was measured.
    """

    name: str
    kind: str  # "gpu": experts cross a link from host memory; "cpu": device and host are one
    device_memory: int
    device_gb_per_s: float  # the device reading its own memory
    device_gflops: float  # dense 16-bit products
    link: str  # what moves an expert into its slot
    link_gb_per_s: float
    link_latency_us: float  # of one record, beside its bytes over the rate
    host_memory: int
    host_gb_per_s: float
    disk_gb_per_s: float
    disk_latency_us: float
    layer_us: float  # of one layer of a step beside reading and computing: launches, tables
    step_us: float  # of one step likewise: dispatch, sampling
    reached: dict[str, float]  # by "device", "compute", "link", "host", "disk"
    sources: dict[str, str]  # where the numbers come from
    # What the kernels take where that was measured, by format, then by tokens (a decimal number):
    # microseconds per million weights. Instead of reading and products where a format is there.
    kernels: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # Microseconds per thousand tokens of the vocabulary, of choosing the next one from the logits.
    draw_us: float = 0.0
    # Microseconds of a layer with misses over a link, beside moving and computing.
    miss_us: float = 0.0

    def rate(self, what: str) -> float:
        """Bytes per second that "device", "link", "host" or "disk" really moves."""
        return getattr(self, f"{what}_gb_per_s") * self.reached[what] * 1e9

    @property
    def flops(self) -> float:
        """Products and sums per second that the device really does."""
        return self.device_gflops * self.reached["compute"] * 1e9

    def kernel_us(self, format: str, tokens: float) -> float | None:
        """Microseconds that a million weights in a format take for so many tokens at once.

        Between measured numbers of tokens along a line, beyond the last in proportion; None where
        the format was not measured.
        """
        if format not in self.kernels:
            return None
        known = sorted((int(count), us) for count, us in self.kernels[format].items())
        most, longest = known[-1]
        if tokens >= most:
            return longest * tokens / most
        counts, times = zip(*known, strict=True)
        return float(np.interp(tokens, counts, times))

    def to_json(self) -> str:
        """One JSON document, read back by `machine`."""
        return json.dumps(dataclasses.asdict(self), indent=1)


# Shares of nominal rates that programs reach; not measured on these machines.
REACHED = {"device": 0.75, "compute": 0.5, "link": 0.76, "host": 0.7, "disk": 0.7}
RATES = {"16x3": 15.75, "8x4": 15.75, "16x4": 31.5, "16x5": 63.0}  # GB/s by PCIe lanes x generation
LINK_US = 10.0
GPU_LAYER_US, GPU_STEP_US = 60.0, 300.0
HOST = {
    "host_memory": parse_bytes("64GiB"),
    "host_gb_per_s": 89.6,
    "disk_gb_per_s": 7.0,
    "disk_latency_us": 80.0,
}
UNVERIFIED = "datasheet figure, not verified"
SOURCES = {
    "link": "lanes x 8, 16 or 32 GT/s x 128/130 / 8 (PCI Express); 31.5 GB/s for 16 lanes of 4.0: "
    "https://fudzilla.com./news/ai/50832-nvidia-unveils-the-a100-tensor-core-gpu; assumed: 10 us "
    "per copy",
    "host": "assumed: 64 GiB in two channels of DDR5-5600, 5600 MT/s x 8 bytes each",
    "disk": "7 GB/s: Samsung 980 PRO, https://www.pugetsystems.com/parts/Hard-Drive/"
    "Samsung-980-Pro-2TB-Gen4-M-2-SSD-13831/; assumed: 80 us per read",
    "overheads": "assumed, not measured on a GPU: about ten launches a layer of 6 us each",
    "reached": "link: 12 GB/s of pinned memory over 16 lanes of 3.0, of 15.75 (Intel oneAPI FPGA "
    "Handbook, Prepinning Memory, https://intel.com/content/www/us/en/docs/oneapi-fpga-add-on/"
    "developer-guide/2024-0/prepinning-memory.html); device: 78 % for weights on an H100 "
    "(https://mikamirai.com/blog/gpu-memory-bandwidth/); the others assumed",
}


def _gpu(name: str, memory: str, rate: float, tflops: float, pcie: str, source: str) -> Machine:
    return Machine(
        name=name,
        kind="gpu",
        device_memory=parse_bytes(memory),
        device_gb_per_s=rate,
        device_gflops=tflops * 1e3,
        link=f"PCIe {pcie[-1]}.0 x{pcie.partition('x')[0]}",
        link_gb_per_s=RATES[pcie],
        link_latency_us=LINK_US,
        layer_us=GPU_LAYER_US,
        step_us=GPU_STEP_US,
        reached=REACHED,
        sources={"device": source, **SOURCES},
        **HOST,
    )


GA102 = "https://docslib.org/doc/759549/nvidia-ampere-ga102-gpu-architecture-whitepaper"
# Products with sums in f32. A GeForce makes half of what it makes with sums in f16; cards of
# GA102 and Ada four (A6000) or two (GeForce) times what they make without tensor cores.
DEVICES = {
    "3080 ti": "memory: 384 bits x 19 Gbit/s = 912 GB/s, 12 GB: https://wccftech.com/"
    "nvidia-geforce-rtx-3080-ti-12-gb-gddr6x-10240-cuda-cores-april-launch-rumor/ (before the "
    f"launch); products: {UNVERIFIED} (NVIDIA Ampere GA102 white paper, {GA102})",
    "3090": "936 GB/s, 24 GB, FP16 142 TFLOPS, half of it with f32 sums: https://holynerdvana."
    "blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html",
    "4060 ti": "16 GB, PCIe 4.0 x8, FP32 22.06 TFLOPS (twice that on tensor cores): https://"
    "cputronic.com/gpu/nvidia-geforce-rtx-4060-ti-16-gb; 288 GB/s: https://www.guru3d.com/story/"
    "geforce-rtx-4060-ti-gpu-pictured/",
    "4090": "1008 GB/s, 24 GB, BF16 165.15 TFLOPS: https://waredb.com/processor/"
    "nvidia-geforce-rtx-4090",
    "a6000": "768 GB/s, 48 GB, PCIe 4.0 x16: https://servethehome.com/"
    "nvidia-rtx-a6000-48gb-gpu-drops-quadro-designation; FP32 38.71 TFLOPS (four times that on "
    "tensor cores): https://sysrqmts.com/es/gpus/compare/nvidia-rtx-a6000-vs-nvidia-tesla-p40",
    "a100": "1555 (40 GB), 1935 (80 GB, PCIe) or 2039 GB/s (80 GB, SXM), PCIe 4.0: https://www."
    "thundercompute.com/blog/nvidia-a100-specs-full-guide; BF16 312 TFLOPS: https://upb-pc2."
    "atlassian.net/wiki/spaces/PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK",
    "h100": "80 GB, 2000 (PCIe) or 3350 GB/s (SXM), PCIe 5.0, BF16 1513 or 1979 TFLOPS with "
    "sparsity, half without: https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
}
LAPTOP = (
    "LPDDR5X of 7500 MT/s x 128 bits = 120 GB/s: https://techymag.com/article/lenovo-unveiled-the-"
    "worlds-first-notebook-with-lpcamm2-memory-smaller-size-better-speed-and-power-consumption/935;"
    " assumed: 16 GiB, 8 cores with AVX2 that make 800 GFLOPS and read all of it"
)


def _laptop() -> Machine:
    sources = {"device": LAPTOP, "host": LAPTOP, "link": "copies within memory read and write it"}
    return Machine(
        name="laptop with NVMe",
        kind="cpu",
        device_memory=parse_bytes("16GiB"),
        host_memory=parse_bytes("16GiB"),
        device_gb_per_s=120.0,
        host_gb_per_s=120.0,
        device_gflops=800.0,
        link="memory copy",
        link_gb_per_s=60.0,
        link_latency_us=1.0,
        disk_gb_per_s=HOST["disk_gb_per_s"],
        disk_latency_us=HOST["disk_latency_us"],
        layer_us=100.0,
        step_us=500.0,
        reached=REACHED,
        sources={n: SOURCES[n] for n in ("disk", "overheads", "reached")} | sources,
    )


def _preset(name: str, memory: str, rate: float, tflops: float, pcie: str, key: str) -> Any:
    return lambda: _gpu(name, memory, rate, tflops, pcie, DEVICES[key])


SMOE = "RTX 3080 Ti on PCIe 3.0, as in SMoE"
PRESETS = {
    "rtx-3080-ti": _preset("RTX 3080 Ti", "12GiB", 912, 68.2, "16x4", "3080 ti"),
    "rtx-3080-ti-pcie3": _preset(SMOE, "12GiB", 912, 68.2, "16x3", "3080 ti"),
    "rtx-3090": _preset("RTX 3090", "24GiB", 936, 71.0, "16x4", "3090"),
    "rtx-4060-ti": _preset("RTX 4060 Ti 16 GB", "16GiB", 288, 44.1, "8x4", "4060 ti"),
    "rtx-4090": _preset("RTX 4090", "24GiB", 1008, 165.2, "16x4", "4090"),
    "a6000": _preset("RTX A6000", "48GiB", 768, 154.8, "16x4", "a6000"),
    "a100-40-pcie": _preset("A100 PCIe 40 GB", "40GiB", 1555, 312, "16x4", "a100"),
    "a100-40-sxm": _preset("A100 SXM 40 GB", "40GiB", 1555, 312, "16x4", "a100"),
    "a100-80-pcie": _preset("A100 PCIe 80 GB", "80GiB", 1935, 312, "16x4", "a100"),
    "a100-80-sxm": _preset("A100 SXM 80 GB", "80GiB", 2039, 312, "16x4", "a100"),
    "h100-pcie": _preset("H100 PCIe", "80GiB", 2000, 756.5, "16x5", "h100"),
    "h100-sxm": _preset("H100 SXM", "80GiB", 3350, 989.5, "16x5", "h100"),
    "laptop": _laptop,
    "server-2core": lambda: parse_machine(SERVER.read_text(), str(SERVER)),
}


def machine(name_or_file: str) -> Machine:
    """The machine of a preset's name, or of a JSON file.

    The file is what `moejax plan --hardware NAME --json` shows as `machine`, edited or not, or what
    `moejax bench hw` printed.

    Raises:
        InputError: no such preset, or not such a file.
    """
    if name_or_file in PRESETS:
        return PRESETS[name_or_file]()
    path = pathlib.Path(name_or_file).expanduser()
    if not path.is_file():
        known = ", ".join(PRESETS)
        raise InputError(f"no file and no machine is named {name_or_file!r:.80}; known: {known}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(unreadable(path, error)) from error
    return parse_machine(text, str(path))


def parse_machine(text: str, where: str) -> Machine:
    """The machine of a JSON document; see `machine`."""
    try:
        given: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if isinstance(given, dict) and "record_bytes" in given:
        return from_hardware(Hardware.from_json(text))
    try:
        made = Machine(**given)
        _check(made)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"{where} is neither a machine of `moejax plan --json` nor of `moejax bench hw`: "
            f"{error}"
        ) from None
    return made


def _check(given: Machine) -> None:
    if given.kind not in KINDS:
        raise ValueError(f"kind is not one of {', '.join(KINDS)}")
    rates = [given.rate(what) for what in ("device", "link", "host", "disk")]
    positive = [*rates, given.flops, given.device_memory, given.host_memory]
    if not all(0 < value < float("inf") for value in positive):
        raise ValueError("rates and sizes must be positive")
    others = [given.link_latency_us, given.disk_latency_us, given.layer_us, given.step_us]
    others += [given.draw_us, given.miss_us]
    if not all(0 <= value < float("inf") for value in others):
        raise ValueError("latencies must not be negative")
    if not all(isinstance(text, str) for text in [given.name, given.link, *given.sources.values()]):
        raise ValueError("names and sources must be text")
    times = [us for by in given.kernels.values() for count, us in by.items() if int(count) > 0]
    if not all(0 < us < float("inf") for us in times) or {} in given.kernels.values():
        raise ValueError("times of kernels must be positive")


def from_hardware(measured: Hardware, base: Machine | None = None) -> Machine:
    """A machine by its measured record; what that lacks is taken from `base`.

    Args:
        base: None = the measured 2-core server.
    """
    base = base or PRESETS["server-2core"]()
    weights = 3 * measured.width * measured.expert_width
    gflops = [2 * weights * n / us / 1e3 for n, us in measured.device_us_per_expert.items()]
    kernels = {str(n): us / weights * 1e6 for n, us in measured.device_us_per_expert.items()}
    lacking = f"not in the record, as of: {base.name}"
    return dataclasses.replace(
        base,
        name=measured.name,
        kind="cpu" if measured.backend == "cpu" else "gpu",
        device_gb_per_s=measured.record_bytes / measured.device_us_per_expert[1] / 1e3,
        device_gflops=max(gflops),
        link=measured.link,
        link_gb_per_s=measured.link_gb_per_s,
        link_latency_us=measured.link_latency_us,
        host_gb_per_s=measured.record_bytes / measured.host_us_per_expert[1] / 1e3,
        reached=dict.fromkeys(REACHED, 1.0),
        kernels={measured.format: kernels},
        miss_us=measured.miss_us,
        sources={
            "device": f"`moejax bench hw`: experts of {measured.record_bytes} bytes in a store of "
            f"{measured.store_bytes} ({measured.format}, {measured.kernels} kernels)",
            "link": "`moejax bench hw`",
            "disk": lacking,
            "overheads": lacking,
            "memory": lacking,
        },
    )
