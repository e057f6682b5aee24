"""Every exception that moejax raises on purpose; each message says what to do."""


class MoejaxError(Exception):
    """Base class: catch this to catch everything moejax raises on purpose."""


class ConfigError(MoejaxError):
    """A model's config.json is missing, malformed or contradicts itself."""


class UnsupportedModelError(MoejaxError):
    """The model asks for something moejax does not compute (family, quantisation, option)."""


class CheckpointError(MoejaxError):
    """A weight file is missing, truncated, corrupt, hostile or does not fit its config."""


class TokenizerError(MoejaxError):
    """The tokenizer or the chat template is missing or cannot be used."""


class BudgetError(MoejaxError):
    """The memory budget cannot hold what one step needs."""


class InputError(MoejaxError):
    """A prompt, a token id or an option is out of range."""


class LinkError(MoejaxError):
    """Expert records did not arrive: a read error, a short file or a wrong checksum."""


class PolicyError(MoejaxError):
    """An unknown policy, or policy parts that contradict each other."""


class NonFiniteError(MoejaxError):
    """Weights or logits hold NaN or infinity."""


class HubError(MoejaxError):
    """A model could not be downloaded."""


def unreadable(path: object, error: Exception) -> str:
    """One line about a file that cannot be read, which names it once."""
    if isinstance(error, FileNotFoundError):
        return f"there is no file {path}"
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not UTF-8 text"
    return f"cannot read {path}: {reason(error)}"


def reason(error: Exception) -> str:
    """Why a file is of no use, in the words of its owner where Python's are others."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)
