"""What quantisation cost: relative RMS errors of tensors, gathered by kind while they are read."""

from typing import Any


class ErrorTable:
    """Number, mean and maximum of the errors of each kind of tensor, such as "experts/down"."""

    def __init__(self):
        self._kinds: dict[str, list[float]] = {}  # tensors, sum, maximum

    def add(self, kind: str, error: float) -> None:
        """Note the relative RMS error of one tensor."""
        count, total, most = self._kinds.get(kind, [0, 0.0, 0.0])
        self._kinds[kind] = [count + 1, total + error, max(most, error)]

    def rows(self) -> dict[str, dict[str, float]]:
        """{"tensors", "mean", "max"} by kind."""
        return {
            kind: {"tensors": count, "mean": total / count, "max": most}
            for kind, (count, total, most) in sorted(self._kinds.items())
        }

    def export(self) -> dict[str, Any]:
        """All of it as JSON values, for `restore`."""
        return {kind: list(values) for kind, values in self._kinds.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Become the table that was exported."""
        self._kinds = {kind: list(values) for kind, values in state.items()}
