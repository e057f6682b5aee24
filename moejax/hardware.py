"""What a machine can do, as measured for one kind of expert: the numbers that cost models need."""

import dataclasses
import json
from typing import Any

from moejax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Measured rates of one machine for experts of one size; each number is a median.

    A rate holds for records that lie in `store_bytes` of memory: compare that with the machine's
    caches before taking it for a memory bandwidth.
    """

    name: str  # the processor
    cores: int  # that this process may use
    device: str
    backend: str
    versions: dict[str, str]
    format: str  # in which records are held
    kernels: str  # that computed and copied
    width: int  # D
    expert_width: int  # F
    record_bytes: int
    store_bytes: int  # of the records that were read and copied
    link: str  # what a fetch is on this machine
    link_gb_per_s: float  # 1e9 bytes per second, whole records
    link_latency_us: float  # of one record beside its bytes over the rate; 0 = lost in the noise
    stream_read_gb_per_s: float  # all cores reading one large array
    stream_read_bytes: int
    host_us_per_expert: dict[int, float]  # by tokens: one expert's FFN where the store lies
    device_us_per_expert: dict[int, float]  # by tokens: one expert's FFN in its slot
    contended_link_gb_per_s: float  # while the host computes experts for one token
    contended_host_us_per_expert: float  # for one token, while the link copies
    # Of a layer with a missing expert, beside the time of its record over a link and computing:
    # asking, making room, the kernels called again. 0 = not measured.
    miss_us: float = 0.0

    def to_json(self) -> str:
        """One JSON document, read back by `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Hardware":
        """The record that `to_json` wrote.

        Raises:
            InputError: not such a document.
        """
        try:
            given: dict[str, Any] = json.loads(text)
            for name in ("host_us_per_expert", "device_us_per_expert"):
                given[name] = {int(tokens): time for tokens, time in given[name].items()}
            return cls(**given)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not a Hardware record of `moejax bench hw`: {error}") from None
