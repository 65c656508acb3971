"""Where an HTTP source asks, and as whom: URLs, credentials, proxies, redirects.

Knows: URLs, netrc, the proxy variables, which headers may go where.
Must not know: requests, answers, the event loop.

Laws of this file:

* Credentials and the user's headers belong to the scheme, host and port of the first URL; a
  place elsewhere gets none of them.
* No error or log line from here holds a URL: what signs it stands in its query.
* A redirect never leaves TLS.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

try:
    from yarl import URL
except ImportError as error:
    raise ImportError(
        "images on web servers are read with aiohttp: pip install 'aiouffd[http]'"
    ) from error

log: Final = logging.getLogger("aiouffd.sources.http")


@dataclass(frozen=True, slots=True)
class Place:
    """Where to ask: a URL, the headers meant for it alone, and the proxy before it."""

    url: URL
    headers: Mapping[str, str]
    proxy: str | None

    @classmethod
    def first(cls, text: str, headers: Mapping[str, str], token: str | None) -> Place:
        """Make the place that a user names; it may read the netrc file.

        Raises:
            ValueError: It is no http or https URL.
        """
        url = _url(text)
        headers = dict(headers)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        elif url.user is not None or url.password is not None:
            headers["Authorization"] = _basic(url.user or "", url.password or "")
        elif not any(name.lower() == "authorization" for name in headers):
            headers |= _from_netrc(url.host or "")
        url = url.with_user(None).with_fragment(None)
        return cls(url, headers, _proxy(url))

    def redirected(self, location: str, first: Place) -> Place:
        """Make the place that a redirect from here leads to.

        Args:
            location: Its Location header.
            first: The place the user named.

        Raises:
            ValueError: It leads to no http or https URL, or out of TLS.
        """
        try:
            url = _url(str(self.url.join(_escaped(location))))
        except ValueError:
            raise ValueError("it redirects to no http or https URL") from None
        if self.url.scheme == "https" and url.scheme == "http":
            raise ValueError("it redirects from https to http, which anyone could change")
        url = url.with_user(None).with_fragment(None)
        ours = url.origin() == first.url.origin()
        return Place(url, first.headers if ours else {}, _proxy(url))


def _escaped(text: str) -> URL:
    """Parse a URL, leaving its escapes as they are: some signatures cover them."""
    return URL(text, encoded=text.isascii() and text.isprintable() and " " not in text)


def _url(text: str) -> URL:
    with contextlib.suppress(ValueError):  # its text would be the URL
        url = _escaped(text)
        if url.scheme in ("http", "https") and url.host and url.port is not None:
            return url
    raise ValueError("not an http or https URL")


def _basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


def _from_netrc(host: str) -> dict[str, str]:
    """Look a host up in the user's netrc; a ``default`` entry would tell it to strangers."""
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    try:
        found = netrc.netrc(path).hosts.get(host)
    except FileNotFoundError:
        return {}
    except (OSError, netrc.NetrcParseError) as error:
        log.warning("%s is not used: %s", path, error)
        return {}
    return {} if found is None else {"Authorization": _basic(found[0], found[2])}


def _proxy(url: URL) -> str | None:
    import urllib.request  # takes long, and only this function needs it

    proxies = urllib.request.getproxies()
    if not proxies or urllib.request.proxy_bypass(url.host or ""):
        return None
    return proxies.get(url.scheme, proxies.get("all"))
