"""S3's client with a limit to each answer, and without redirects: s3fs has whatever comes in memory, of a listing, of an error, of
bytes by their range; and aiohttp goes wherever an answer says, with the user's session token (`X-Amz-Security-Token`).

The client lets itself be given the class of its sessions (botocore's `config_kwargs`); what reads a body is aiohttp's.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from multidict import CIMultiDict

PIECE = 1 << 16


class TooLong(Exception):
    """An answer that goes on beyond what any may have."""


class _Body:
    """A body of which no more than `most` bytes are read."""

    def __init__(self, body: Any, most: int) -> None:
        self._body, self._most, self._left = body, most, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    async def read(self, n: int = -1) -> bytes:
        pieces = []
        while n and (piece := await self._body.read(min(n, PIECE) if n > 0 else PIECE)):
            self._left -= len(piece)
            if self._left < 0:
                raise TooLong(f"the answer is longer than {self._most:,} bytes")
            pieces.append(piece)
            if n > 0:  # whoever asks for so many takes fewer
                break
        return b"".join(pieces)


def session(most: int) -> type[AIOHTTPSession]:
    """The class of sessions whose answers have at most so many bytes."""

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> Response:
            await super().start(connection)
            self.content: Any = _Body(self.content, most)
            return self

        @property
        def headers(self) -> Any:
            """Without an address to go to: aiohttp then stays. A bucket of another region is botocore's to find, which signs anew."""
            return CIMultiDict(
                (k, v) for k, v in self._headers.items() if k.lower() not in ("location", "uri")
            )

    class Session(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: str | None) -> Any:
            made = await super()._get_session(proxy_url)
            made._response_class = Response  # there is no other way to it; seen in aiobotocore 3.10
            return made

    return Session
