"""Chat templates: Jinja programs of a model repository, rendered as transformers does.

They are untrusted code. They run in jinja2's immutable sandbox, see plain data only, and get the
same few functions as in transformers 5.23.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from moejax.errors import InputError, TokenizerError

OLDEST_JINJA = (3, 1, 6)  # older ones have known escapes from the sandbox
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Template:
    """One chat template, compiled on first use."""

    def __init__(self, source: str):
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, for templates that ask for it on a day (None = today).

        Raises InputError where messages or variables are not plain data, TokenizerError where the
        template is wrong or refuses them.
        """
        if isinstance(messages, str) or not messages:
            raise InputError("messages must be a non-empty list of {'role': ..., 'content': ...}")
        messages = [_message(message) for message in messages]
        variables = plain_data(variables)
        template = _compile(self.source)
        functions = {} if now is None else {"strftime_now": lambda format: now.strftime(format)}
        try:
            return template.render(**{"messages": messages, **functions, **variables})
        except Exception as error:  # a template may fail in any way
            raise TokenizerError(f"the chat template failed: {error}") from error


def plain_data(value: Any) -> Any:
    """A copy made of JSON types only: methods of other objects are not safe in the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    raise InputError(f"chat messages must be str, numbers, lists and dicts, got {type(value)}")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without empty keys, its reasoning under the two names that templates read."""
    if not isinstance(message, Mapping):
        raise InputError(f"a chat message must be a dict, got {message!r}")
    message = {key: item for key, item in plain_data(message).items() if item is not None}
    reasoning = next((message[key] for key in REASONING_FIELDS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@functools.cache
def _compile(source: str) -> Any:
    environment = _environment()
    try:
        return environment.from_string(source)
    except Exception as error:  # a template may fail in any way
        raise TokenizerError(f"the chat template is not valid Jinja: {error}") from error


@functools.cache
def _environment() -> Any:
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise TokenizerError("chat templates need `pip install 'jinja2>=3.1.6'`") from error
    if tuple(map(int, jinja2.__version__.split(".")[:3])) < OLDEST_JINJA:
        raise TokenizerError(
            f"jinja2 {jinja2.__version__} is not safe for chat templates; "
            f"`pip install -U 'jinja2>=3.1.6'`"
        )

    class Generation(Extension):
        """`generation` blocks mark what an assistant wrote; they print their content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_content")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _namespace_class()
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


class _Dict:
    """`dict` without the attributes through which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace_class() -> type:
    import jinja2
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class PublicNamespace(Namespace):
        """`namespace` without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any):  # `self` may be a keyword
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return PublicNamespace
