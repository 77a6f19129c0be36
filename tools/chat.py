"""chat.py: turns chat messages into token ids and a mask of what the assistant says.

Uses the tokenizer.json and the chat template of a Hugging Face model folder, and renders the
template as transformers does, so that a sample has the tokens the model will see when it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from errors import InputError

Message = dict[str, str]


class _GenerationBlock(Extension):
    """Accepts {% generation %} … {% endgeneration %}, which some templates put around replies."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class Chat:
    """Tokenizer and chat template of one model folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        content = _read(self.folder / "tokenizer.json", "a Hugging Face model folder has one")
        self.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
        settings = _load_json(self.folder / "tokenizer.json", content)
        special = [t["content"] for t in settings.get("added_tokens", []) if t["special"]]
        self._special = "|".join(re.escape(t) for t in sorted(special, key=len, reverse=True))
        # The template writes the special tokens itself, so the post-processor has nothing to add;
        # left in, the byte-level one also trims spaces off the offsets that the mask is made from.
        settings.update(post_processor=None, truncation=None, padding=None)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library has no type of its own
            path = folder / "tokenizer.json"
            raise InputError(f"{path}: cannot be read as a tokenizer: {error}") from error

        template, self._variables = _load_template(self.folder)
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        self._template = _compile(template)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The chat as text; with the generation prompt, up to where the assistant speaks."""
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error

    def encode(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids and mask: 1 on every assistant reply including its end-of-turn token.

        Throws InputError if the template rewrites earlier text when later messages are known, since
        then training text and the prompt at use would differ.
        """
        text = self.render(messages)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return self._tokens_and_mask(
            text, [self._reply(text, messages, index)[::2] for index in replies]
        )

    def encode_choice(
        self, messages: list[Message], reply: str
    ) -> tuple[list[int], list[int]]:
        """Token ids and mask of the generation prompt and the beginning of a reply, all of it
        scored; no end-of-turn token. The tokens of the prompt do not depend on the reply.
        """
        chat = [*messages, {"role": "assistant", "content": reply}]
        text = self.render(chat)
        start, end, _ = self._reply(text, chat, len(messages))
        tokens, mask = self._tokens_and_mask(text[:end], [(start, end)])
        prompt = self._tokenizer.encode(text[:start], add_special_tokens=False).ids
        if tokens[: len(prompt)] != prompt or sum(mask) != len(tokens) - len(prompt):
            raise InputError(
                f"candidate {reply!r} changes the tokens of the prompt before it; begin it with"
                " a letter"
            )
        return tokens, mask

    def _reply(self, text: str, messages: list[Message], index: int) -> tuple[int, int, int]:
        """Where message `index` begins, ends, and ends with its end-of-turn token, in `text`."""
        before = self.render(messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise InputError(
                f"message {index}: the chat template is not prefix-stable: the text before this"
                " reply changes when later messages are added; split the chat into one sample for"
                " each reply"
            )
        content = messages[index]["content"].strip()
        found = content and re.compile(
            rf"{re.escape(content)}\s*(?:{self._special})" if self._special else r"(?!)"
        ).search(text, len(before))
        if not found:
            raise InputError(
                f"message {index}: the reply, followed by a special token that ends the turn, is"
                " not in the text that the chat template makes; it must not be empty, and the"
                " template must neither rewrite it nor leave its end open"
            )
        return len(before), found.start() + len(content), found.end()

    def _tokens_and_mask(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        mask = [
            int(any(begin < end and stop > start for start, end in spans))
            for begin, stop in encoding.offsets
        ]
        return encoding.ids, mask


def _read(path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {hint}") from error


def _load_json(path: Path, content: bytes) -> dict:
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error


def _load_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens (bos_token …) that it may use by name."""
    path = folder / "tokenizer_config.json"
    config = _load_json(path, _read(path, "it names the special tokens"))
    variables = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            variables[key] = text
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise InputError(
            f"{folder}: no chat template, neither in chat_template.jinja nor as chat_template in"
            " tokenizer_config.json; take the instruct version of the model or add a template"
        )
    return template, variables


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template cannot be read: {error}") from error
