"""`zoo pull`, `zoo plan` and `zoo convert`: from a name or a path to a canonical folder.

- `source.py`    what a source is, and opening it by its headers
- `space.py`     what will be fetched and written, in bytes
- `fetch.py`     the ways in which its bytes come: whole files, streamed, or ranges
- `run.py`       the orchestration: start here
- `stored.py`    a source in an object store
- `sent.py`      a destination in one
- `progress.py`  parts of one whole
"""

from zoo.pull.run import Preview, convert, preview, pull
from zoo.pull.source import Opened, default_folder, is_local, not_here, open_source, spec_of

__all__ = [
    "Opened",
    "Preview",
    "convert",
    "default_folder",
    "is_local",
    "not_here",
    "open_source",
    "preview",
    "pull",
    "spec_of",
]
