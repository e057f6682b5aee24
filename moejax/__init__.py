"""Run, study and compare Mixture-of-Experts language models whose experts do not fit the device."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Completion": "runtime",
    "DecodeState": "state",
    "ExpertCache": "state",
    "ExpertStore": "state",
    "KVCache": "state",
    "ModelConfig": "config",
    "MoejaxError": "errors",
    "Policy": "policies.policy",
    "Runtime": "runtime",
    "Sampling": "sampling",
    "StepTrace": "state",
    "decode_step": "decode",
    "init_state": "decode",
    "load": "loading",
    "policy_names": "policies.policy",
    "prefill": "decode",
}
__all__ = sorted(_PUBLIC)

if importlib.util.find_spec("moejax.kernels") is None:
    raise ImportError(
        "this is moejax's source folder, which hides an installed moejax and is not whole without "
        "an installation: `pip install -e '.[test]'` in it, or run elsewhere"
    )

if TYPE_CHECKING:
    from moejax.config import ModelConfig as ModelConfig
    from moejax.decode import decode_step as decode_step
    from moejax.decode import init_state as init_state
    from moejax.decode import prefill as prefill
    from moejax.errors import MoejaxError as MoejaxError
    from moejax.loading import load as load
    from moejax.policies.policy import Policy as Policy
    from moejax.policies.policy import policy_names as policy_names
    from moejax.runtime import Completion as Completion
    from moejax.runtime import Runtime as Runtime
    from moejax.sampling import Sampling as Sampling
    from moejax.state import DecodeState as DecodeState
    from moejax.state import ExpertCache as ExpertCache
    from moejax.state import ExpertStore as ExpertStore
    from moejax.state import KVCache as KVCache
    from moejax.state import StepTrace as StepTrace


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Lazy: the command line answers --help without importing JAX.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moejax.{_PUBLIC[name]}"), name)
