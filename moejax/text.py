"""Text in and out: tokenizer files, chat templates, streaming detokenisation, stop strings.

Transformers, slow to import, is not needed. No code of a model repository is ever run; its chat
template runs in jinja2's immutable sandbox.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from moejax.chat import Template
from moejax.config import MAX_SIZE
from moejax.detokenize import decoder_stages
from moejax.errors import InputError, TokenizerError, reason

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SENTENCEPIECE_PROBES = ("Hello, wörld  \U0001f642 12", " lead\n", "   东京", "e\u0301\ufb01\u2460")
# Arguments of transformers' apply_chat_template that are not variables of the template.
UNSUPPORTED_CHAT_OPTIONS = set(
    """continue_final_message max_length padding return_assistant_tokens_mask return_dict
    return_tensors sanitize_control_tokens tokenize tokenizer_kwargs truncation""".split()
)


class Tokenizer:
    """The tokenizer, special tokens and chat templates of one model."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        """Wrap a `tokenizers` tokenizer.

        Args:
            backend: is changed: added tokens of `config` enter it, truncation and padding go.
            config: the content of tokenizer_config.json.
            generation_config: the content of generation_config.json.
            chat_templates: by name; "default" is used unless there are tools and a "tool_use".
        """
        config = config or {}
        generation_config = generation_config or {}
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        _add_tokens(backend, config.get("added_tokens_decoder") or {})
        self.special_tokens = {
            name: content for name in NAMED_TOKENS if (content := _content(name, config.get(name)))
        }
        self.vocab_size: int = backend.get_vocab_size()
        self.bos_id = self._named_id("bos_token", _token_id(generation_config, "bos_token_id"))
        self.pad_id = self._named_id("pad_token", _token_id(generation_config, "pad_token_id"))
        eos_id = self._named_id("eos_token", None)
        self.eos_ids = eos_ids_from(generation_config) or (() if eos_id is None else (eos_id,))
        # Files such as DeepSeek's ask for the first token here and not in tokenizer.json.
        adds_bos = backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]
        self._prepends_bos = (
            config.get("add_bos_token") is True and self.bos_id is not None and not adds_bos
        )
        self._templates = {
            name: Template(source) for name, source in (chat_templates or {}).items()
        }

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read the tokenizer files of a Hugging Face model directory. Raises TokenizerError."""
        directory = Path(directory)
        config = _read_json(directory / "special_tokens_map.json")
        given = _read_json(directory / "tokenizer_config.json")
        config |= {name: value for name, value in given.items() if value is not None}
        if (directory / "tokenizer.json").is_file():
            backend = _read_backend(directory / "tokenizer.json")
        elif (directory / "tokenizer.model").is_file():
            backend, defaults = _convert_sentencepiece(directory / "tokenizer.model")
            config = {**defaults, **config}
        else:
            raise TokenizerError(
                f"{directory} has neither tokenizer.json nor tokenizer.model; copy the tokenizer "
                f"files of the original model into it"
            )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        given = _read_json(directory / "config.json")
        generation_config = {name: given[name] for name in names if name in given}
        generation_config |= _read_json(directory / "generation_config.json")
        return cls(
            backend,
            config=config,
            generation_config=generation_config,
            chat_templates=_read_templates(directory, config.get("chat_template")),
        )

    def _named_id(self, name: str, otherwise: int | None) -> int | None:
        content = self.special_tokens.get(name)
        return otherwise if content is None else self.backend.token_to_id(content)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        The text of a chat template already holds its special tokens: encode it without adding any.
        Raises InputError where the text is not valid unicode.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            raise InputError("a text must be a str of valid unicode") from error
        return [self.bos_id, *ids] if add_special_tokens and self._prepends_bos else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary (padding rows of a model) are silent.

        Raises InputError for a negative id.
        """
        ids = [int(token) for token in ids]
        if ids and min(ids) < 0:
            raise InputError(f"token ids must not be negative, got {min(ids)}")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, as transformers renders it.

        Args:
            messages: dicts with "role" and "content", in order.
            add_generation_prompt: end with the beginning of an answer.
            chat_template: another template, or the name of one that the model has.
            tools: JSON schemas.
            variables: others of the template, as `enable_thinking`; `now`, a datetime, for its day.

        Raises TokenizerError where there is no template or it refuses the messages, InputError
        where the messages are not plain data.
        """
        if unsupported := UNSUPPORTED_CHAT_OPTIONS & variables.keys():
            raise InputError(f"apply_chat_template has no option {sorted(unsupported)[0]!r}")
        template = self._template(chat_template, bool(tools))
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{"documents": None, **self.special_tokens, **variables},
        )

    def _template(self, wanted: str | None, tools: bool) -> Template:
        if wanted is not None:
            return self._templates.get(wanted) or Template(wanted)
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        names = f" (it has {', '.join(self._templates)}: name one)" if self._templates else ""
        raise TokenizerError(
            f"the model has no default chat template{names}; pass chat_template=, or give a plain "
            f"prompt instead of messages"
        )


def eos_ids_from(generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence; empty where the config names none. Raises InputError."""
    ids = generation_config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(token) is not int or not 0 <= token <= MAX_SIZE for token in ids):
        raise InputError(f"eos_token_id must be token ids, got {ids!r:.80}")
    return tuple(ids)


class StreamDecoder:
    """Turn tokens into text one by one; all of it together is `decode` of all tokens, exactly.

    `push` returns what later tokens cannot change, never a part of a character. The time of a token
    does not depend on how many came before. Decoders whose text is only known at the end (such as
    WordPiece, which no model here uses) return everything from `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        added = tokenizer.backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special and skip_special_tokens}
        decoder = tokenizer.backend.decoder
        self._spec = None if decoder is None else json.loads(decoder.__getstate__())
        self._begin()

    def _begin(self) -> None:
        self._stages = decoder_stages(self._spec)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that has become certain with this token. Raises InputError for a negative id."""
        token = int(token)
        if token < 0:
            raise InputError(f"token ids must not be negative, got {token}")
        if self._stages is None:
            self._waiting.append(token)
            return ""
        piece = None if token in self._skipped else self._tokenizer.backend.id_to_token(token)
        return "" if piece is None else self._run([piece], last=False)

    def flush(self) -> str:
        """The text held back; the next token then begins another sequence."""
        if self._stages is None:
            text = self._tokenizer.decode(self._waiting, self._skip_special_tokens)
        else:
            text = self._run([], last=True)
        self._begin()
        return text

    def _run(self, pieces: list[str], last: bool) -> str:
        for stage in self._stages:
            pieces = stage(pieces, last)
        return "".join(pieces)


class StopStrings:
    """Cut streamed text before the first stop string to be complete, however it is split up.

    Of stop strings complete at the same character the longest counts; `matched` then names it.
    """

    def __init__(self, stops: str | Iterable[str]):
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise InputError(f"stop strings must be non-empty strings, got {self._stops!r}")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain to come before any stop string, and whether one was found."""
        if self.matched is not None:
            return "", True
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops]
        found = [match for match in found if match[0] + match[1] >= 0]
        if found:
            end, _, self.matched = min(found)
            return text[: end - len(self.matched)], True
        keep = min(len(text), max(self._longest - 1, 0))
        while keep and not any(stop.startswith(text[len(text) - keep :]) for stop in self._stops):
            keep -= 1
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, none after a stop string."""
        text = "" if self.matched is not None else self._held
        self._held = ""
        return text


def _wrong(what: str, value: Any) -> TokenizerError:
    return TokenizerError(f"{what} cannot be {value!r:.80}; copy the model's files again")


def _is_text(value: Any) -> bool:
    """Whether a value is a str of valid unicode."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _token_id(generation_config: Mapping[str, Any], name: str) -> int | None:
    token = generation_config.get(name)
    if token is not None and (type(token) is not int or not -1 <= token <= MAX_SIZE):
        raise _wrong(f"{name} of generation_config.json or config.json", token)
    return None if token == -1 else token  # old files say -1 for none


def _content(name: str, token: Any) -> str | None:
    """The text of a special token, spelled as a string or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is not None and not _is_text(content):
        raise _wrong(f"{name} of tokenizer_config.json or special_tokens_map.json", token)
    return content


def _add_tokens(backend: tokenizers.Tokenizer, declared: Any) -> None:
    """Bring the added tokens of tokenizer_config.json into the tokenizer, as transformers does."""
    known = {i: repr(token) for i, token in backend.get_added_tokens_decoder().items()}
    try:
        tokens = {int(i): tokenizers.AddedToken(**fields) for i, fields in declared.items()}
    except (AttributeError, TypeError, ValueError) as error:
        what = f"added_tokens_decoder of tokenizer_config.json ({error!s:.100})"
        raise _wrong(what, declared) from error
    for index, token in sorted(tokens.items()):
        if known.get(index) != repr(token):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise TokenizerError(
                f"tokenizer_config.json gives {token.content!r} the id {index}, the tokenizer "
                f"{backend.token_to_id(token.content)}; copy both files from the same model again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {reason(error)}; copy it again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} does not hold a JSON object; copy it again")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{path} cannot be read ({error}); copy it again") from error


def _read_templates(directory: Path, configured: Any) -> dict[str, str]:
    """Chat templates by name; files win over tokenizer_config.json."""
    named = configured or []
    if not isinstance(named, list):
        named = [{"name": "default", "template": named}]
    keys = ("name", "template")
    for entry in named:
        if not isinstance(entry, dict) or not all(_is_text(entry.get(k)) for k in keys):
            raise _wrong("an entry of tokenizer_config.json's chat_template", entry)
    templates = {entry["name"]: entry["template"] for entry in named}
    files = {path.stem: path for path in (directory / "chat_templates").glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        try:
            templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except UnicodeError as error:
            message = f"a chat template of {directory} is not UTF-8 ({error}); copy it again"
            raise TokenizerError(message) from error
    return templates


def _convert_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A BPE model of SentencePiece and its special tokens, checked against the library itself.

    Not through transformers: 5.23 orders merges by id instead of score and loses a space in front.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise TokenizerError(
            f"{path} is a SentencePiece model and there is no tokenizer.json: "
            f"`pip install sentencepiece`, or add the model's tokenizer.json"
        ) from error
    try:
        source = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises nothing narrower
        raise TokenizerError(f"{path} cannot be read ({error}); copy it again") from error
    names = [source.id_to_piece(i) for i in range(source.get_piece_size())]
    special = [i for i in range(len(names)) if source.is_control(i) or source.is_unknown(i)]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(source, names, vocabulary),
        unk_token=names[source.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    config = {"add_bos_token": True}
    for name, i in (("bos_token", source.bos_id()), ("eos_token", source.eos_id())):
        config |= {name: names[i]} if i >= 0 else {}
    for prefix in ([normalizers.Prepend("▁")], []):
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        if all(backend.encode(text).ids == source.encode(text) for text in SENTENCEPIECE_PROBES):
            backend.add_special_tokens([names[i] for i in special])
            return backend, config
    raise TokenizerError(
        f"{path} is not a BPE model like Mixtral's; add the model's tokenizer.json"
    )


def _merges(source: Any, names: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score of the result first."""
    ranked = []
    for i, name in enumerate(names):
        if source.is_control(i) or source.is_unknown(i) or source.is_byte(i):
            continue
        for cut in range(1, len(name)):
            left, right = vocabulary.get(name[:cut]), vocabulary.get(name[cut:])
            if left is not None and right is not None:
                ranked.append((-source.get_score(i), left, right))
    return [(names[left], names[right]) for _, left, right in sorted(ranked)]
