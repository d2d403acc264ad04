"""Protection of web servers on this machine from web pages: only their own pages, and programs, may use them.

Every page that a browser shows can send requests to servers on the loopback interface. Prefect's settings do not stop
them: its CORS settings only restrict what pages read, and its CSRF protection covers neither WebSockets nor a foreign
name that resolves to this machine (DNS rebinding).
"""

import ipaddress
import re
import socket

import psutil
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/?#@\s]+)(:[0-9]{1,5})?")
# No other site may show these pages in a frame, or use them as pictures or scripts.
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
)


def is_loopback(host: str) -> bool:
    """Return whether `host` names the loopback interface, which other machines cannot reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Return whether `host` stands for all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def url_host(host: str) -> str:
    """Return `host` as it is written in URLs: IPv6 addresses are in brackets."""
    return f"[{host}]" if ":" in host else host


def own_names(host: str) -> frozenset[str]:
    """Return the host names, as in URLs, by which a server that listens on `host` may be addressed.

    On a network, these include the machine's name; on all interfaces, the addresses of each of them.
    """
    if is_loopback(host):
        return _LOOPBACK | {url_host(host)}
    names = {host, socket.gethostname(), socket.getfqdn()}
    if is_wildcard(host):
        interfaces = psutil.net_if_addrs().values()
        # Link-local IPv6 addresses are followed by their interface, which URLs lack.
        names |= {address.address.split("%")[0] for addresses in interfaces for address in addresses
                  if address.family in (socket.AF_INET, socket.AF_INET6)}  # fmt: skip
    return _LOOPBACK | {url_host(name).lower() for name in names}


class Guard:
    """An ASGI application that answers 403 to requests and WebSockets of foreign pages, and passes on the others."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        """Guard `app`, whose own pages are those of `names`: host names as in URLs, on any port.

        The port is open because tunnels (`ssh -L`) change it; a page's origin must have the port that it calls.
        """
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or accept or refuse a WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "http":
            await PlainTextResponse(f"{refusal}\n", status_code=403)(scope, receive, _with_headers(send))
        else:
            # Before the handshake is accepted, this is answered as 403.
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        found = _AUTHORITY.fullmatch(host)
        if found is None or found[1] not in self._names:
            known = ", ".join(sorted(self._names))
            return f"Host: {', '.join(hosts)[:200] or 'missing'}: not a name of this server; use one of {known}"
        if origins and {origin.lower() for origin in origins} - {f"http://{host}", f"https://{host}"}:
            return f"Origin: {', '.join(origins)[:200]}: pages of other sites may not use this server"
        # Browsers send no Origin with some requests, such as those for pictures, but say where these come from.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_link(scope, headers):
            return "Sec-Fetch-Site: pages of other sites may not use this server"
        return None


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Return whether a person followed a link, which opens a page of ours in place of the other site's."""
    is_page = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and is_page


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            added = [header for header in _HEADERS if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_with_headers
