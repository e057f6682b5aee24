"""What machines can do, for plans and replays: presets from datasheets, or a measured file."""

import dataclasses
import json
import pathlib
from typing import Any

from moejax.errors import InputError
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

    def rate(self, what: str) -> float:
        """Bytes per second that "device", "link", "host" or "disk" really moves."""
        return getattr(self, f"{what}_gb_per_s") * self.reached[what] * 1e9

    @property
    def flops(self) -> float:
        """Products and sums per second that the device really does."""
        return self.device_gflops * self.reached["compute"] * 1e9

    def to_json(self) -> str:
        """One JSON document, read back by `machine`."""
        return json.dumps(dataclasses.asdict(self), indent=1)


# Shares of nominal rates that well-made programs reach; not measured on these machines.
REACHED = {"device": 0.75, "compute": 0.5, "link": 0.8, "host": 0.7, "disk": 0.7}
RATES = {"16x3": 15.75, "8x4": 15.75, "16x4": 31.5, "16x5": 63.0}  # GB/s by PCIe lanes x generation
LINK_US = 10.0
GPU_LAYER_US, GPU_STEP_US = 60.0, 300.0
HOST = {
    "host_memory": parse_bytes("64GiB"),
    "host_gb_per_s": 89.6,
    "disk_gb_per_s": 7.0,
    "disk_latency_us": 80.0,
}
SOURCES = {
    "link": "PCI Express Base Specification: 8, 16 or 32 GT/s per lane, 128b/130b; 10 us per copy "
    "is assumed",
    "host": "assumed: 64 GiB in two channels of DDR5-5600 (JEDEC JESD79-5: 44.8 GB/s each)",
    "disk": "assumed: an NVMe drive on PCIe 4.0 x4; Samsung 980 PRO data sheet: 7 GB/s reads",
    "overheads": "assumed, not measured on a GPU: about ten launches a layer of 6 us each",
    "reached": "assumed: usual shares of nominal rates",
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


AMPERE = "NVIDIA Ampere GA102 GPU Architecture white paper, V2"
ADA = "NVIDIA Ada GPU Architecture white paper, V2"
A100 = "NVIDIA A100 Tensor Core GPU datasheet"
H100 = "NVIDIA H100 Tensor Core GPU datasheet (dense: half of what it states with sparsity)"
LAPTOP = "assumed: 8 cores with AVX2, all reading LPDDR5X-7500 of 128 bits (120 GB/s nominal)"


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


PRESETS = {
    "rtx-3080-ti": lambda: _gpu("RTX 3080 Ti", "12GiB", 912, 68.2, "16x4", AMPERE),
    "rtx-3080-ti-pcie3": lambda: _gpu(
        "RTX 3080 Ti on PCIe 3.0, as in SMoE", "12GiB", 912, 68.2, "16x3", AMPERE
    ),
    "rtx-3090": lambda: _gpu("RTX 3090", "24GiB", 936, 71.0, "16x4", AMPERE),
    "rtx-4060-ti": lambda: _gpu("RTX 4060 Ti 16 GB", "16GiB", 288, 44.1, "8x4", ADA),
    "rtx-4090": lambda: _gpu("RTX 4090", "24GiB", 1008, 165.2, "16x4", ADA),
    "a6000": lambda: _gpu(
        "RTX A6000", "48GiB", 768, 154.8, "16x4", f"NVIDIA RTX A6000 datasheet; {AMPERE}"
    ),
    "a100-40-pcie": lambda: _gpu("A100 PCIe 40 GB", "40GiB", 1555, 312, "16x4", A100),
    "a100-40-sxm": lambda: _gpu("A100 SXM 40 GB", "40GiB", 1555, 312, "16x4", A100),
    "a100-80-pcie": lambda: _gpu("A100 PCIe 80 GB", "80GiB", 1935, 312, "16x4", A100),
    "a100-80-sxm": lambda: _gpu("A100 SXM 80 GB", "80GiB", 2039, 312, "16x4", A100),
    "h100-pcie": lambda: _gpu("H100 PCIe", "80GiB", 2000, 756.5, "16x5", H100),
    "h100-sxm": lambda: _gpu("H100 SXM", "80GiB", 3350, 989.5, "16x5", H100),
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
        raise InputError(f"cannot read {path}: {error}") from error
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
    others = (given.link_latency_us, given.disk_latency_us, given.layer_us, given.step_us)
    if not all(0 <= value < float("inf") for value in others):
        raise ValueError("latencies must not be negative")
    if not all(isinstance(text, str) for text in [given.name, given.link, *given.sources.values()]):
        raise ValueError("names and sources must be text")


def from_hardware(measured: Hardware, base: Machine | None = None) -> Machine:
    """A machine by its measured record; what that lacks is taken from `base`.

    Args:
        base: None = the measured 2-core server.
    """
    base = base or PRESETS["server-2core"]()
    weights = 3 * measured.width * measured.expert_width
    gflops = [2 * weights * n / us / 1e3 for n, us in measured.device_us_per_expert.items()]
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
        sources={
            "device": f"`moejax bench hw`: experts of {measured.record_bytes} bytes in a store of "
            f"{measured.store_bytes} ({measured.format}, {measured.kernels} kernels)",
            "link": "`moejax bench hw`",
            "disk": lacking,
            "overheads": lacking,
            "memory": lacking,
        },
    )
