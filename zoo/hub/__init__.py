"""The transport of `zoo pull`: what a repository holds, and its bytes, whole and verified.

Nine short files, each on top of the one before:

- `endpoint.py`  `HF_ENDPOINT`, looked at before the library is imported
- `errors.py`    every refusal as one message that says what to do
- `files.py`     a repository at one commit, and its files
- `http.py`      one request that survives cuts, stalls, 429 and 503, and never shows the token to another host
- `repo.py`      `resolve`: a name and revision -> a commit and its files, with sizes and hashes; paths are checked here
- `cache.py`     the Hub's cache as other tools know it, plus two things of our own: parts that can be continued and
                 a memory of what was verified
- `transfer.py`  `download` and its relatives
- `upload.py`    the library's client under limits, for the length of an upload
- `clone.py`     what a git clone says that its files should be

What the library does well is left to it: its session (proxies, certificates, offline mode), its token, its settings
(`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, ...), its cache layout. Importing this package imports huggingface_hub.
"""

from zoo.hub import endpoint

endpoint.check()  # the library fails at one that is none, while it is imported

# ruff: noqa: E402
from zoo.hub.cache import cached
from zoo.hub.errors import HubError
from zoo.hub.files import RemoteFile, Snapshot
from zoo.hub.http import RETRY, Retry
from zoo.hub.repo import check_path, resolve
from zoo.hub.transfer import (
    Progress,
    download,
    download_ranges,
    download_sparse,
    download_to,
    hashed,
    read_headers,
    read_range,
    read_safetensors_header,
)

__all__ = [
    "RETRY",
    "HubError",
    "Progress",
    "RemoteFile",
    "Retry",
    "Snapshot",
    "cached",
    "check_path",
    "download",
    "download_ranges",
    "download_sparse",
    "download_to",
    "hashed",
    "read_headers",
    "read_range",
    "read_safetensors_header",
    "resolve",
]
