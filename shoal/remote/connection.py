"""What speaks HTTP for all calls, with the key and the environment's proxies and certificates.

It must not know servers, nor what is sent.
"""

from __future__ import annotations

import httpx2 as httpx

from shoal.core.errors import UsageError

CONNECT = 10.0  # seconds


def client(key: str, direct: bool = False) -> httpx.AsyncClient:
    """What speaks HTTP; `direct`: whatever the environment says of proxies. A UsageError for a key, or an environment,
    that it cannot do with; the key is not in it."""
    headers = {"Content-Type": "application/json", "User-Agent": "shoal"}
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            "OPENAI_API_KEY has characters that no header can have, such as curly quotes or a line break: "
            "copy the key again, without quotes"
        )
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        timeout = httpx.Timeout(None, connect=CONNECT)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=not direct)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise UsageError(
            f"no connection can be made as the environment has it ({error}): correct or unset HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        ) from error
