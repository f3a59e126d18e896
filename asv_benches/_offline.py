"""Put beside asv's pages the libraries that they load from the network, so that the site needs none.

They come from npm's registry, each archive checked against the hash that is stated here.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tarfile
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

REGISTRY = "https://registry.npmjs.org"
FOLDER = "vendor"
REMOTE = re.compile(r'(?P<name>src|href)="(?P<url>https://[^"]+\.(?:js|css))"(?P<rest>[^>]*)>')


class Missing(Exception):
    """A library that could not be had; the message says which and why."""


class Library(NamedTuple):
    name: str
    version: str
    sha512: str
    files: dict[str, str]
    """The file of the archive that stands for one that a page loads, by the latter's name."""
    folders: tuple[str, ...] = ()
    """Folders of the archive from which those files load others themselves."""

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name}-{self.version}.tgz"


LIBRARIES = (
    Library("jquery", "3.3.1",
            "Ubldcmxp5np52/ENotGxlLe6aGMvmF4R8S6tZjsP6Knsaxd/xp3Zrh50cG93lR6nPXyUFwzN3ZSOQI0wRJNdGg==",
            {"jquery-3.3.1.min.js": "dist/jquery.min.js"}),
    Library("flot", "0.8.3",
            "xg2otcTJDvS+ERK+my4wxG/ASq90QURXtoM4LhacCq0jQW2jbyjdttbRNqU2cPykrpMvJ6b2uSp6SAgYAzj9tQ==",
            {f"jquery.{part}.min.js": f"jquery.{part}.js"
             for part in ("flot", "flot.time", "flot.selection", "flot.categories")}),
    Library("flot-orderbars", "1.0.0",
            "Jv51fvzevUjNXEeozpwEKfPjhiZhfiJddv0WHjduUTCmSF+7T5K7C9c9Y1wIVmUhDBv5fLMjgbwKecT0GIKPZA==",
            {"jquery.flot.orderBars.js": "js/jquery.flot.orderBars.js"}),
    Library("stupid-table-plugin", "1.1.3",
            "2Vk7XouQPxUQPRe9w0Fu7ZZ8kHLK7rDoLMsCgtKxRNJ7f4dSOGvW9CkHsq5wD6QsaEnWoyLBYH3xOEsrK3yWBg==",
            {"stupidtable.min.js": "stupidtable.min.js"}),
    Library("blueimp-md5", "2.19.0",
            "DRQrD6gJyy8FbiE4s+bDoXS9hiW3Vbx5uCdwvcCf3zLHL+Iv7LtGHLpr+GZV8rHG8tK766FGYBwRbu8pELTt+w==",
            {"md5.min.js": "js/md5.min.js"}),
    Library("bootstrap", "3.1.1",
            "TAzqS8E/ISpVHP29gYhy+1NSV+FJwApDVQhDfgLYsIuUDJiqJzH2DfORN5tiu+Ie2iBLrzEG34t4Rf465cigqg==",
            {"bootstrap.min.js": "dist/js/bootstrap.min.js", "bootstrap.min.css": "dist/css/bootstrap.min.css"},
            ("dist/fonts",)),
)  # fmt: skip


def fetched(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bytes(answer.read())
    except OSError as reason:
        raise Missing(f"{url}: {reason}") from reason


def make_offline(
    site: Path, libraries: tuple[Library, ...] = LIBRARIES, fetch: Callable[[str], bytes] = fetched
) -> None:
    """Let the page in `site` load what it needs from beside itself."""
    page = site / "index.html"
    places = {name: (library, member) for library in libraries for name, member in library.files.items()}
    used: dict[str, Library] = {}

    def local(match: re.Match[str]) -> str:
        name = PurePosixPath(match["url"]).name
        if name not in places:
            raise Missing(f"this version of asv loads {match['url']}, which asv_benches/_offline.py does not know")
        library, member = places[name]
        used[library.name] = library
        handler = ' onerror="js_load_failure()"' if "onerror" in match["rest"] else ""
        return f'{match["name"]}="{FOLDER}/{library.name}/{member}"{handler}>'

    # The page last: until everything lies beside it, it is as asv left it.
    text = REMOTE.sub(local, page.read_text(encoding="utf-8"))
    for library in used.values():
        unpack(library, fetch(library.url), site / FOLDER / library.name)
    page.write_text(text, encoding="utf-8")


def unpack(library: Library, archive: bytes, target: Path) -> None:
    """Write what is needed of an archive whose hash is the stated one."""
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != library.sha512:
        raise Missing(f"{library.url} is not the archive that was stated: its SHA-512 is {found}")
    with tarfile.open(fileobj=BytesIO(archive), mode="r:gz") as members:
        for member in members:
            path = PurePosixPath(member.name).relative_to("package")
            wanted = str(path) in library.files.values() or str(path.parent) in library.folders
            if wanted and (file := members.extractfile(member)) is not None:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(file.read())
