"""Of which run a trace is: what of it another policy would have had otherwise.

How many tokens a pass verifies, and which, was up to whoever drafted, and what records and experts
cost was measured while the policy of the run decided. A replay is right about both only if it is
that run again.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moejax.errors import PolicyError
from moejax.policies.lengths import FixedLength
from moejax.policies.policy import Policy
from moejax.policies.policy import policy as preset
from moejax.policies.speculation import Speculate
from moejax.traces.trace import Phase, Trace

# Entries of `about`: whose run it was. `policy` is its name, for people: its numbers may change.
PARTS, CAPACITY, PER_LAYER = "policy_parts", "capacity", "per_layer"
FIELDS = ("router", "evictor", "placement", "predictor", "cutoff", "foresight", "speculation")
SPECULATION = "speculation"
TO_COME = "None"  # of a number that loading a model adds, such as the distances of its experts
COUNTED = ("needed", "hits", "fetched", "prefetched", "host")
BY_TEXT = ("lookup", "model")  # drafts that no slot has a part in


def parts_of(policy: Policy) -> dict[str, str]:
    """The types and all numbers of a policy but its capacity, by their paths, as a header has them.

    Numbers are rounded to f32, as programs use them; of larger arrays there is a digest.
    """
    return dict(pair for name in FIELDS for pair in _parts(name, getattr(policy, name)))


def _parts(path: str, part: Any) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(part):
        yield path, f"{type(part).__module__}.{type(part).__qualname__}"
        for field in dataclasses.fields(part):
            if field.name != "node_type":  # the type again, see `state.pytree`
                yield from _parts(f"{path}.{field.name}", getattr(part, field.name))
    elif isinstance(part, tuple | list):
        yield path, f"{len(part)} items"
        for number, each in enumerate(part):
            yield from _parts(f"{path}.{number}", each)
    else:
        yield path, _said(part)


def _said(value: Any) -> str:
    if value is None or isinstance(value, str | bool):
        return str(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return repr(value)[:200]
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    if array.ndim:
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return str(array.item())


def name_of(policy: Policy, text: str | None) -> str | None:
    """The text if it names this policy, whatever its capacity."""
    if text is None:
        return None
    try:
        return text if _alike(parts_of(policy), parts_of(preset(text))) else None
    except PolicyError:
        return None


def _alike(ran: Mapping[str, str], made: Mapping[str, str]) -> bool:
    """Whether a policy that ran has the parts of one that no model was loaded for yet."""
    given = {path: said for path, said in made.items() if said != TO_COME}
    return ran.keys() == made.keys() and all(ran[path] == said for path, said in given.items())


def same(trace: Trace, policy: Policy, per_layer: bool) -> bool:
    """Whether the header says that it was a run of this policy, with as many slots, and how."""
    about = trace.about
    setting = {CAPACITY: int(policy.capacity), PER_LAYER: per_layer}
    if any(about.get(name) != own for name, own in setting.items()):
        return False
    return _alike(about.get(PARTS) or {}, parts_of(policy))


def agrees(trace: Trace, counts: Mapping[str, np.ndarray], whole: bool) -> bool:
    """Whether the run counted in every pass and layer what a replay [P, L] did.

    Args:
        whole: or else that it began as the replay does, where something is known to be rounded.
    """
    if not set(COUNTED) <= set(trace.counts):
        return False
    names, passes = (COUNTED, slice(None)) if whole else (("needed", "hits"), slice(1))
    return all(np.array_equal(trace.counts[n][passes], counts[n][passes]) for n in names)


def drafted(trace: Trace) -> bool:
    """Whether a pass of the trace holds drafts beside the tokens that a plain step would have."""
    rows = np.flatnonzero(trace.phase == Phase.VERIFY)
    pairs = np.stack([trace.run[rows], trace.sequence[rows]])
    return np.unique(pairs, axis=1).shape[1] < len(rows)


def has_windows(trace: Trace, policy: Policy, own: bool) -> bool:
    """Whether the policy would have run the passes of the trace, and not more or longer ones.

    Args:
        own: whether the replay is the trace's own run again.
    """
    speculation = policy.speculation
    if not speculation.max_length:
        return not drafted(trace)
    if own:
        return True
    # Then residents or clocks may have a part in who drafts how much, or the text alone.
    fixed = type(speculation) is Speculate and type(speculation.lengths) is FixedLength
    if not fixed or speculation.draft.kind not in BY_TEXT or (trace.phase == Phase.DECODE).any():
        return False
    ran = (trace.about.get(PARTS) or {}).items()
    ran = {path: said for path, said in ran if path.partition(".")[0] == SPECULATION}
    return ran == dict(_parts(SPECULATION, speculation))
