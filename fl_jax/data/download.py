"""Fetching the raw files of a published data set, when asked to."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from fl_jax.data.published import Published
from fl_jax.errors import FlJaxError

TIMEOUT = 10.0  # seconds without a byte, before a server counts as out of reach


def download(published: Published, folder: Path, mirror: str | None = None, *, progress: bool = True) -> Path:
    """Fetch all raw files into `folder`/raw, which is returned; what they hold is verified by who parses them.

    mirror: an address under which the files have their names, instead of the canonical addresses. Raises FlJaxError, naming the
    address, where the network fails or a file is cut off.
    """
    raw = folder / "raw"
    raw.mkdir()
    for name, url in published.files:
        _fetch(f"{mirror.rstrip('/')}/{name}" if mirror else url, raw / name, progress)
    return raw


def _fetch(url: str, path: Path, progress: bool) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "fl_jax"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(path, "wb") as file:
            length = answer.headers.get("Content-Length")
            size = None if length is None else int(length)
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not progress, leave=False) as bar:
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
            if size is not None and file.tell() != size:
                raise http.client.IncompleteRead(b"", size - file.tell())
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the answer too, with a socket
        raise FlJaxError(
            f"Downloading {url} failed ({reason}): check the network, or put the file in a folder and name that by --from."
        ) from error
