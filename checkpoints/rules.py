"""Where each tensor of a checkpoint belongs, as a table checked in full before anything is read."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.checkpoints.headers import GGUF_BLOCKS, Problems, TensorInfo
from moejax.formats import held_shape, matrix_layout, parameter_format
from moejax.layout import DTYPES, QUANTISED, MatrixLayout, RecordLayout

EXPERTS = "experts"
EXPERT_TARGETS = ("experts/gate_up", "experts/down")
SOURCE_DTYPES = ("BF16", "F16", "F32")
QUANTISED_DTYPES = ("F8_", "F6_", "F4")
QUANTISED_NAMES = re.compile(
    r"(.*[._])?(weight_scale|weight_scale_inv|weight_packed|qweight|qzeros|scales|g_idx|blocks"
    r"|input_scale|absmax|quant_map|quant_state\..*)"
)
MAX_LAYERS = 1024  # of a model; probed to turn a stack index back into a layer's number
NAMED = 3  # missing tensors of one pattern that an error names one by one


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table: tensors named like `pattern` belong at `target`.

    `{layer}` and `{expert}` in the pattern stand for decimal numbers. The target is a dense path
    such as "attention/q", or "experts/gate_up" or "experts/down" (one expert's with `{expert}` in
    the pattern, else all experts of the layer stacked), or None for a tensor that is not needed.
    `half` 0 or 1: the tensor is the first or second half of the target's rows (gate is half 0 of
    gate_up, up is half 1). Where several rules match a name, the first whose target the model has
    at that layer applies.
    """

    pattern: str
    target: str | None
    half: int | None = None

    def __post_init__(self):
        if self.half not in (None, 0, 1):
            raise ValueError(f"half of {self.pattern} must be 0, 1 or None")
        if self.is_expert and self.target not in EXPERT_TARGETS:
            raise ValueError(f"{self.target} is not one of {EXPERT_TARGETS}")
        if self.is_expert and not self.stacked:
            raise ValueError(f"an expert's pattern needs {{layer}}: {self.pattern}")

    @property
    def is_expert(self) -> bool:
        """Whether the target is a part of expert records."""
        return self.target is not None and self.target.startswith(EXPERTS + "/")

    @property
    def stacked(self) -> bool:
        """Whether the tensor is one layer of its target."""
        return "{layer}" in self.pattern

    @functools.cached_property
    def _regex(self) -> re.Pattern:
        # One spelling per number and a bounded length: "00" would be a second name for layer 0.
        number = r"(?P<\1>0|[1-9][0-9]{0,5})"
        return re.compile(re.sub(r"\\\{(layer|expert)\\\}", number, re.escape(self.pattern)))

    def match(self, name: str) -> dict[str, int] | None:
        """The numbers in a matching name, e.g. {"layer": 3, "expert": 7}, or None."""
        found = self._regex.fullmatch(name)
        return found and {key: int(value) for key, value in found.groupdict().items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMap:
    """All a reader must know of a model: the rules, and what they have to fill.

    specs: dense path -> anything with `shape` (stack dimension included) and `dtype` (bf16 or f32).
    stack_index(target, layer): where in the stack a layer's tensor belongs, None when that layer
    has no such tensor or the model has no such layer; for "experts/..." the expert layer's number.
    layout, expert_layers (L), experts (E): of the records, [L * E, R]; left out for a dense model.
    A rule whose target has no spec (or no layout) never applies.
    quant: a quantised format for the linear maps (see `quantised`), None for floats; specs stay
    those of the float weights.
    """

    rules: Sequence[Rule]
    specs: Mapping[str, Any]
    stack_index: Callable[[str, int], int | None]
    layout: RecordLayout | None = None
    expert_layers: int = 0
    experts: int = 0
    quant: str | None = None

    def __post_init__(self):
        unfilled = set(self.specs) - {rule.target for rule in self.rules}
        if unfilled:
            raise ValueError(f"no rule fills {sorted(unfilled)}")
        for path, spec in self.specs.items():
            if np.dtype(spec.dtype).name not in DTYPES:
                raise ValueError(f"{path} is {spec.dtype}; weights are one of {list(DTYPES)}")
        for rule in self.rules:
            spec = self.specs.get(rule.target)
            if spec is None or rule.half is None:
                continue
            if spec.shape[int(rule.stacked)] % 2:
                raise ValueError(f"{rule.target} has no halves: {spec.shape}")

    def quantised(self, quant: str | None) -> "WeightMap":
        """The same model with its linear maps in a quantised format; None changes nothing."""
        if quant is None:
            return self
        if quant not in QUANTISED:
            raise ValueError(f"{quant} is not one of {QUANTISED}")
        layout = self.layout and dataclasses.replace(self.layout, dtype=quant)
        return dataclasses.replace(self, layout=layout, quant=quant)

    @functools.cached_property
    def formats(self) -> dict[str, str]:
        """Formats of the dense parameters that are quantised."""
        if self.quant is None:
            return {}
        tied = "head/weight" not in self.specs
        named = {
            path: parameter_format(path, np.dtype(spec.dtype).name, self.quant, tied)
            for path, spec in self.specs.items()
        }
        return {path: format for path, format in named.items() if format in QUANTISED}

    def held(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype in which a dense parameter is held: u8 [..., bytes] where quantised."""
        shape, dtype = tuple(self.specs[path].shape), np.dtype(self.specs[path].dtype)
        if path not in self.formats:
            return shape, dtype
        return held_shape(shape, self.formats[path]), np.dtype(np.uint8)

    @property
    def records_shape(self) -> tuple[int, int] | None:
        """Shape [L * E, R] of the expert records, None for a dense model."""
        if self.layout is None:
            return None
        return self.expert_layers * self.experts, self.layout.elements


@dataclasses.dataclass(frozen=True)
class Placement:
    """A run of a tensor's elements and where it lies, contiguous on both sides."""

    tensor: TensorInfo
    skip: int  # first element, within the tensor
    count: int  # elements
    target: str  # a dense path, or "experts" for the records
    start: int  # first element within the flat target; where quantised, first byte of the matrix
    dtype: str  # the target's: "bfloat16" or "float32"; "float32" where quantised
    matrix: MatrixLayout | None = None  # of the quantised matrix
    row: int = 0  # of it, that the run begins with
    kind: str = ""  # the rule's target, such as "experts/down"

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return self.tensor.nbytes * self.count // max(math.prod(self.tensor.shape), 1)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """What one tensor fills: `expert` of layer `index` of a stack, None for all that is there."""

    shape: tuple[int, ...]  # expected of the tensor
    index: int
    expert: int | None
    count: int  # elements for each start
    starts: Iterable[int]
    dtype: str
    halves: Sequence[int]
    matrix: MatrixLayout | None
    row: int


class _Planner:
    def __init__(self, weights: WeightMap):
        self.weights = weights
        self.problems = Problems()
        self.placements: list[Placement] = []
        # By target, stack index and half: the tensor that fills each expert, or None: all of it.
        self.filled: dict[tuple[str, int, int], dict[int | None, str]] = {}
        self.used: set[Rule] = set()
        self._layers: dict[str, dict[int | None, int]] = {}
        split = {rule.target for rule in weights.rules if rule.half is not None}
        self.halves = {target: 2 if target in split else 1 for target in self.targets()}

    def targets(self) -> Iterator[str]:
        yield from self.weights.specs
        if self.weights.layout is not None:
            yield from EXPERT_TARGETS

    def size(self, target: str) -> int:
        """How many stack indices the target has."""
        if target in EXPERT_TARGETS:
            return self.weights.expert_layers
        stacked = any(rule.stacked for rule in self.weights.rules if rule.target == target)
        return self.weights.specs[target].shape[0] if stacked else 1

    def slot(self, rule: Rule, numbers: dict[str, int]) -> _Slot | None:
        """What a matching tensor fills, None where the model has no such tensor."""
        weights = self.weights
        if rule.target not in self.halves:
            return None
        index = weights.stack_index(rule.target, numbers["layer"]) if rule.stacked else 0
        if index is None:
            return None
        limit = self.size(rule.target)
        if not 0 <= index < limit:
            raise ValueError(f"stack_index gave {index} of {limit} for {rule.target}, {numbers}")
        matrix, row = None, 0
        if rule.is_expert:
            if numbers.get("expert", 0) >= weights.experts:
                return None
            part, layout = rule.target.removeprefix("experts/"), weights.layout
            base, stride, dtype = layout.parts[part][0], layout.elements, layout.dtype
            first = index * weights.experts + numbers.get("expert", 0)
            records = range(first, first + (1 if "expert" in numbers else weights.experts))
            matrix = layout.matrices[part]
            shape = (matrix.rows, matrix.cols)
        else:
            spec = weights.specs[rule.target]
            shape = tuple(spec.shape[1:] if rule.stacked else spec.shape)
            base, stride, dtype = 0, math.prod(shape), np.dtype(spec.dtype).name
            records = (index,)
            if rule.target in weights.formats:
                matrix = matrix_layout(shape, weights.formats[rule.target])
                stride, dtype = matrix.bytes, matrix.format
        quantised = dtype in QUANTISED
        if rule.half is not None:
            shape = (shape[0] // 2, *shape[1:])
            row = rule.half * shape[0]
            base += 0 if quantised else rule.half * math.prod(shape)
        fused = rule.is_expert and "expert" not in numbers
        return _Slot(
            shape=(weights.experts, *shape) if fused else shape,
            index=index,
            expert=numbers.get("expert"),
            count=math.prod(shape),
            starts=(base + i * stride for i in records),
            dtype="float32" if quantised else dtype,
            halves=range(self.halves[rule.target]) if rule.half is None else (rule.half,),
            matrix=matrix if quantised else None,
            row=row,
        )

    def add(self, tensor: TensorInfo) -> None:
        for rule in self.weights.rules:
            numbers = rule.match(tensor.name)
            if numbers is None:
                continue
            if rule.target is None:
                return
            if slot := self.slot(rule, numbers):
                self.used.add(rule)
                self.fill(rule, tensor, slot)
                return
        if QUANTISED_NAMES.fullmatch(tensor.name) or tensor.dtype.startswith(QUANTISED_DTYPES):
            self.problems.add("quantised", tensor.name, f"({tensor.dtype})")
        else:
            self.problems.add("extra", tensor.name)

    def fill(self, rule: Rule, tensor: TensorInfo, slot: _Slot) -> None:
        def problem(kind, detail):
            self.problems.add(kind, tensor.name, detail, group=rule.pattern)

        if tensor.dtype.startswith(QUANTISED_DTYPES):
            problem("quantised", f"({tensor.dtype})")
        elif tensor.dtype not in SOURCE_DTYPES and tensor.dtype not in GGUF_BLOCKS:
            problem("dtype", f"is {tensor.dtype}, needs one of {', '.join(SOURCE_DTYPES)}")
        elif tensor.shape != slot.shape:
            problem("shape", f"is {list(tensor.shape)}, needs {list(slot.shape)}")
        other = None
        for half in slot.halves:
            owners = self.filled.setdefault((rule.target, slot.index, half), {})
            other = other or owners.get(None) or owners.get(slot.expert)
            if slot.expert is None and owners:
                other = other or owners[min(owners)]
            owners.setdefault(slot.expert, tensor.name)
        if other:
            problem("duplicate", f"holds the same weights as {other}")
        if tensor.shape != slot.shape:
            return
        target = EXPERTS if rule.is_expert else rule.target
        for i, start in enumerate(slot.starts):
            self.placements.append(
                Placement(
                    tensor,
                    i * slot.count,
                    slot.count,
                    target,
                    start,
                    slot.dtype,
                    slot.matrix,
                    slot.row,
                    rule.target,
                )
            )

    def rule_for(self, target: str, half: int) -> Rule:
        fitting = [r for r in self.weights.rules if r.target == target and r.half in (None, half)]
        return next((rule for rule in fitting if rule in self.used), fitting[0])

    def find_missing(self) -> None:
        for target, halves in self.halves.items():
            by_rule = collections.defaultdict(list)
            for half in range(halves):
                by_rule[self.rule_for(target, half)].append(half)
            for rule, of_rule in by_rule.items():
                self.note_missing(rule, of_rule)

    def note_missing(self, rule: Rule, halves: Sequence[int]) -> None:
        """Count the tensors of a rule without which `halves` have holes, and name the first."""
        count, first = 0, []
        each = self.weights.experts if "{expert}" in rule.pattern else 1
        for index in range(self.size(rule.target)):
            taken = self.taken(rule, index, halves)
            count += each - len(taken)
            free = (number for number in range(each) if number not in taken)
            for expert in itertools.islice(free, NAMED - len(first)):
                layer = self.layers(rule.target).get(index, "{layer}")
                name = rule.pattern.replace("{layer}", str(layer))
                first.append(name.replace("{expert}", str(expert)))
        if count > NAMED:
            first = [f"{rule.pattern} ({count} tensors, first: {first[0]})"]
        for name in first:
            self.problems.add("missing", name, group=rule.pattern)

    def taken(self, rule: Rule, index: int, halves: Sequence[int]) -> Collection[int]:
        """Numbers of those of a rule's tensors at `index` that nothing has to fill any more."""
        each = self.weights.experts if rule.is_expert else 1
        owners = [self.filled.get((rule.target, index, half), {}) for half in halves]
        owners = [o for o in owners if None not in o and len(o) < each]
        if "{expert}" in rule.pattern:
            return set.intersection(*map(set, owners)) if owners else range(each)
        return () if owners else range(1)

    def layers(self, target: str) -> dict[int | None, int]:
        """The layer of each stack index."""
        if target not in self._layers:
            index = self.weights.stack_index
            self._layers[target] = {index(target, i): i for i in reversed(range(MAX_LAYERS))}
        return self._layers[target]


def plan(tensors: Iterable[TensorInfo], weights: WeightMap, what: str) -> list[Placement]:
    """Where every tensor of a checkpoint goes, in file order; `what` names it in errors.

    Raises one CheckpointError that lists every missing, extra, duplicate, misshapen or quantised
    tensor and every dtype other than bf16, f16 and f32; long lists are grouped by pattern.
    """
    planner = _Planner(weights)
    counts = collections.Counter()
    for tensor in tensors:
        counts[tensor.name] += 1
        if counts[tensor.name] > 1:
            planner.problems.add("duplicate", tensor.name, f"(again in {tensor.file.name})")
        else:
            planner.add(tensor)
    planner.find_missing()
    planner.problems.raise_if_any(f"{what} does not fit its config")
    return sorted(planner.placements, key=lambda p: (str(p.tensor.file), p.tensor.start, p.skip))
