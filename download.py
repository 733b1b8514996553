"""Files from public addresses, whole and as they should be: broken downloads continue, checksums are verified."""

import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from config import UserError
from files import sha256_of


def download(url: str, sha256: str, folder: Path) -> Path:
    """Fetch `url` into `folder`, continuing a broken download, and check it; an earlier, whole copy is used."""
    path, part = folder / url.split("/")[-1], folder / (url.split("/")[-1] + ".part")
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        try:
            fetch_rest(url, part)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, EOFError) as error:
            if attempt == 4 or getattr(error, "code", 0) in (403, 404):
                hint = f"try again later, or get the file another way and give --from {path.name}"
                raise UserError(f"cannot download {url}: {error}; {hint}") from None
            print(f"download interrupted ({error}); trying again", file=sys.stderr)
            time.sleep(2**attempt)
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise UserError(f"{url}: its sha256 is {found}, not {sha256}; it was not kept. Try again, or use --from")
    return part.rename(path)


def fetch_rest(url: str, part: Path) -> None:
    """Append to `part` the bytes that it lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "herd"})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: `part` is whole, or too long and fails its checksum
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        have = have if response.status == 206 else 0  # a server that knows no ranges begins again
        length = response.length
        total = have + length if length else None
        with tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
                length = length and length - len(block)
        if length:
            raise EOFError(f"{length:,} bytes are missing")
