"""A chat model that needs no key: it shortens what it is given, and streams it word by word."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

SENTENCE = re.compile(r".+?[.?!](?=\s|$)|.+")
WORD = re.compile(r"\s*\S+")


class Scribe(BaseChatModel):
    """Answers with the first sentence of each line of the last message; a word is a token.

    Any other chat model of LangChain can stand in its place.
    """

    #: Seconds between two words.
    pause_s: float = 0.0

    @property
    def _llm_type(self) -> str:
        return "scribe"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        text = shortened(messages)
        message = AIMessage(text, usage_metadata=usage(messages, len(WORD.findall(text))))
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _astream(
        self, messages: list[BaseMessage], *args: Any, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        words = WORD.findall(shortened(messages))
        for word in words:
            await asyncio.sleep(self.pause_s)
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))
        last = AIMessageChunk(
            content="", usage_metadata=usage(messages, len(words)), chunk_position="last"
        )
        yield ChatGenerationChunk(message=last)


def shortened(messages: list[BaseMessage]) -> str:
    lines = str(messages[-1].text).splitlines()
    return "\n".join(found[0] if (found := SENTENCE.match(line)) else "" for line in lines)


def usage(messages: list[BaseMessage], written: int) -> UsageMetadata:
    read = sum(len(WORD.findall(message.text)) for message in messages)
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
