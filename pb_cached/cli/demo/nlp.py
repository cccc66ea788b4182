"""A language model's place, taken by a deterministic one: no key, no network, the same reply every time.

A reply tells how many messages the customer has sent and what the first one was, read from the history that
Parlant puts into the prompt: it proves that the history is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, cast, get_args, get_origin

from parlant.core.common import DefaultBaseModel
from parlant.core.engines.alpha.prompt_builder import BuiltInSection, PromptBuilder
from parlant.core.nlp.embedding import Embedder, EmbeddingResult
from parlant.core.nlp.generation import SchematicGenerationResult, SchematicGenerator, StreamingTextGenerator
from parlant.core.nlp.generation_info import GenerationInfo, UsageInfo
from parlant.core.nlp.moderation import ModerationService, NoModeration
from parlant.core.nlp.service import (
    EmbedderHints,
    NLPService,
    SchematicGeneratorHints,
    StreamingTextGeneratorHints,
)
from parlant.core.nlp.tokenization import EstimatingTokenizer
from pydantic import BaseModel
from typing_extensions import override

T = TypeVar("T", bound=DefaultBaseModel)

_REPLY_FIELD = "response_body"  # of the schema by which the SDK's default composition mode drafts a reply
_DIMENSIONS = 16


class Tokenizer(EstimatingTokenizer):
    @override
    async def estimate_token_count(self, prompt: str) -> int:
        return 1 + len(prompt) // 4  # Parlant divides by it


class Generator(SchematicGenerator[T], Generic[T]):
    """Fills any schema: the reply where it has a place for one, and the least that is valid everywhere else."""

    @override
    async def generate(
        self,
        prompt: str | PromptBuilder,
        hints: Mapping[str, Any] = {},
    ) -> SchematicGenerationResult[T]:
        text = prompt if isinstance(prompt, str) else prompt.build()
        values = _least(self.schema)
        if _REPLY_FIELD in self.schema.model_fields:
            values[_REPLY_FIELD] = reply_to([] if isinstance(prompt, str) else _history(prompt))
        return SchematicGenerationResult(
            content=self.schema.model_validate(values),
            info=GenerationInfo(self.schema.__name__, self.id, 0.0, UsageInfo(len(text) // 4, 1)),
        )

    @property
    @override
    def id(self) -> str:
        return "pb_cached/deterministic"

    @property
    @override
    def max_tokens(self) -> int:
        return 128_000

    @property
    @override
    def tokenizer(self) -> EstimatingTokenizer:
        return Tokenizer()


class HashEmbedder(Embedder):
    """Vectors out of a hash. Parlant's container makes it without arguments."""

    @override
    async def embed(self, texts: list[str], hints: Mapping[str, Any] = {}) -> EmbeddingResult:
        digests = (hashlib.sha256(text.encode()).digest()[:_DIMENSIONS] for text in texts)
        return EmbeddingResult(vectors=[[(byte + 1) / 256 for byte in digest] for digest in digests])

    @property
    @override
    def id(self) -> str:
        return "pb_cached/hash"

    @property
    @override
    def max_tokens(self) -> int:
        return 8192

    @property
    @override
    def tokenizer(self) -> EstimatingTokenizer:
        return Tokenizer()

    @property
    @override
    def dimensions(self) -> int:
        return _DIMENSIONS


class DeterministicNLP(NLPService):
    """The service that `p.Server(nlp_service=...)` takes."""

    @property
    @override
    def supports_streaming(self) -> bool:
        return False

    @override
    async def get_schematic_generator(
        self,
        t: type[T],
        hints: SchematicGeneratorHints = {},  # noqa: B006
    ) -> SchematicGenerator[T]:
        return Generator[t]()  # type: ignore[valid-type]  # it finds its schema by this subscript

    @override
    async def get_streaming_text_generator(
        self,
        hints: StreamingTextGeneratorHints = {},  # noqa: B006
    ) -> StreamingTextGenerator:
        raise NotImplementedError("replies are not streamed")

    @override
    async def get_embedder(self, hints: EmbedderHints = {}) -> Embedder:  # noqa: B006
        return HashEmbedder()

    @override
    async def get_moderation_service(self) -> ModerationService:
        return NoModeration()


def reply_to(said: Sequence[str]) -> str:
    """The reply that follows from what the customer has said so far."""
    if not said:
        return "Hello."
    return f'Turn {len(said)}. You said "{said[-1]}"; your first words were "{said[0]}".'


def _history(prompt: PromptBuilder) -> list[str]:
    """The customer's messages. Parlant hands each event of the history over as a JSON text."""
    section = prompt.sections.get(BuiltInSection.INTERACTION_HISTORY)
    events = [json.loads(text) for text in section.props.get("interaction_events", ())] if section else []
    return [
        str(event["data"]["message"])
        for event in events
        if event["event_kind"] == "message" and event["event_source"] == "user"
    ]


def _least(schema: type[BaseModel]) -> dict[str, Any]:
    """Values for the fields that a schema demands, as little as it takes."""
    return {name: _blank(field.annotation) for name, field in schema.model_fields.items() if field.is_required()}


def _blank(annotation: Any) -> Any:
    origin = get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, BaseModel):
        return _least(origin)
    if isinstance(origin, type) and origin in (list, dict, str, int, float, bool):
        return cast(Any, origin)()
    choices = get_args(annotation)
    if type(None) in choices:
        return None
    return _blank(choices[0]) if choices and isinstance(choices[0], type) else choices[0] if choices else None
