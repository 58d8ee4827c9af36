"""Build Prefect's server as an ASGI application: only its V1 pages, with a policy that forbids other hosts.

python -m uvicorn --factory flows.services.prefect_server:create_app --host 127.0.0.1 --port 4200

Prefect serves both versions of its pages, whatever PREFECT_SERVER_UI_V2_ENABLED says: that only chooses the
first one shown. The V2 pages load a session recorder from another host, and the pages of the API's
documentation load their scripts from one.
"""

from typing import TYPE_CHECKING

from prefect.server.api import server

from flows.services.prefect_workarounds import hide_v2_pages
from flows.services.processes import PAGE_POLICY

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DOCUMENTATION = ("/docs", "/redoc", "/api/docs", "/api/redoc")
INSTEAD = (
    b"This page is not served: it would load its scripts from another host. "
    b"The API is described in /openapi.json.\n"
)


class ClosedPages:
    """Add the policy to every answer, and answer 404 for pages that would be blank under it."""

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                kept = [
                    header for header in message["headers"] if header[0].lower() != b"content-security-policy"
                ]
                message["headers"] = [*kept, (b"content-security-policy", PAGE_POLICY.encode())]
            await send(message)

        if scope["type"] == "http" and scope["path"].rstrip("/") in DOCUMENTATION:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send_with_policy({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": INSTEAD})
        else:
            await self.app(scope, receive, send_with_policy)


def create_app() -> ClosedPages:
    """Return Prefect's server; its settings are in the environment, as for `prefect server start`."""
    hide_v2_pages()
    return ClosedPages(server.create_app(final=True))
