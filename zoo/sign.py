"""A folder signed, and held to a signature, with OpenSSF's model-signing (`pip install 'zoo-weights[sign]'`).

The signature `model.sig` in the folder is a Sigstore bundle over the SHA-256 of every file, made with an elliptic-curve key (P-256,
P-384, P-521): `model_signing verify key` reads it as well as zoo does. Nothing is asked of any server.

A signature says who vouches for the files; a certificate, which it covers, says what was found out about them. What changes a
file afterwards, `zoo verify` that writes a new certificate too, ends it.

Not covered: the signature itself, and what git and huggingface-hub keep beside a download (`.gitattributes`, `.cache`).
"""

from __future__ import annotations

import ast
import base64
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.errors import ZooError, translated
from zoo.formats.base import read_json
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import write_plain
from zoo.verify.certificate import SIGNATURE

StrPath = str | os.PathLike[str]
BESIDE = (SIGNATURE, ".cache")
MAX_KEY = 1 << 16
MAX_OTHER, MOST_OTHERS = 1 << 28, 1000
"""Bytes, and number, of files that are hashed although the signature does not list them, so that all that differs is told at once."""


def is_encrypted(key: Path) -> bool:
    """Whether a private key needs a password."""
    return b"ENCRYPTED" in _pem(key)


def _pem(key: Path) -> bytes:
    """What a key's file holds. Raises ZooError where it is none, before a library reads it to its end."""
    try:
        found = key.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) or found.st_size > MAX_KEY:
            raise ZooError(f"{key}: no file, or of {found.st_size} bytes (limit {MAX_KEY}): not a key in PEM")
        return key.read_bytes()
    except OSError as e:
        raise ZooError(f"{key}: {e.strerror or e}") from None


@translated
def sign(folder: StrPath, key: StrPath, password: str | None = None) -> Path:
    """Sign every file of `folder` with the private key in the PEM file `key`; the signature's path.

    Raises ZooError if model-signing is not installed, the key is none of the kinds it takes, or the folder holds links.
    """
    folder, key = Path(folder), Path(key)
    _refuse_no_folder(folder)
    signing, hashing = _library()
    _pem(key)
    with _said(folder, key), tempfile.TemporaryDirectory() as made:
        config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=BESIDE))
        # Its annotation says str; what reads the key wants bytes.
        config.use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
        config.sign(folder, Path(made) / SIGNATURE)
        write_plain(folder / SIGNATURE, (Path(made) / SIGNATURE).read_bytes())
    return folder / SIGNATURE


@translated
def check(folder: StrPath, key: StrPath) -> int:
    """Hold every file of `folder` to its signature by the public key in the PEM file `key`; how many files there are.

    Raises ZooError, naming the files, if one is altered, missing or not signed, or the signature is another key's.
    """
    folder, key = Path(folder), Path(key)
    _refuse_no_folder(folder)
    path = folder / SIGNATURE
    if not path.is_file():
        raise ZooError(
            f"{path}: missing: the folder is not signed (`zoo sign {folder} --key PRIVATE.pem` signs one)"
        )
    hashing, files = _library()[1], listed(path)
    _pem(key)
    _refuse_others(folder, files)
    from model_signing import verifying

    with _said(folder, key):
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        # Of our choice, whatever the signature asks for: every file, and what we leave out.
        config.set_hashing_config(hashing.Config().set_ignored_paths(paths=BESIDE))
        config.verify(folder, path)
    return len(files)


def listed(path: Path) -> list[Any]:
    """The files that a signature lists."""
    try:
        payload = read_json(path, "it is the signature")["dsseEnvelope"]["payload"]
        return list(parse_json(base64.b64decode(payload))["predicate"]["resources"])
    except (ZooError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise ZooError(f"{path}: no signature as model-signing writes it ({e!s:.200})") from None


def _refuse_others(folder: Path, signed: list[Any]) -> None:
    """Raises ZooError for files that the signature does not list where to hash them, as the library does before it compares the lists, would take
    long: a sparse file of a tebibyte costs who adds it nothing."""
    names = {x.get("name") for x in signed if isinstance(x, dict) and isinstance(x.get("name"), str)}
    size, others = 0, list[str]()
    for at, below, found in os.walk(folder):
        below[:] = [x for x in below if not x.startswith(".git") and x != ".cache"]  # which may be left out
        for name in found:
            path = Path(at) / name
            if (rest := path.relative_to(folder).as_posix()) not in names and rest not in BESIDE:
                others.append(rest)
                size += path.lstat().st_size
            if size > MAX_OTHER or len(others) > MOST_OTHERS:
                more = f" and more, of over {size:,} bytes" if len(others) > 1 else f", of {size:,} bytes"
                raise ZooError(f"{folder}: not as it was signed: it also has {others[-1]}{more}")


def _refuse_no_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ZooError(f"{folder}: no folder; a model's folder is signed as a whole")


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing
    except ImportError as e:
        raise ZooError(
            f"signatures need the package model-signing: pip install 'zoo-weights[sign]' ({e})"
        ) from None
    return signing, hashing


@contextmanager
def _said(folder: Path, key: Path) -> Iterator[None]:
    """What the libraries raise, as one sentence."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    logging.getLogger("model_signing").setLevel(logging.ERROR)
    try:
        yield
    except InvalidSignature:
        raise ZooError(f"{folder / SIGNATURE}: is not signed by the key {key}, or was altered") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        if (told := str(e)).startswith("Signature mismatch"):
            raise ZooError(
                f"{folder}: not as it was signed: {_differing(told.partition(': ')[2]):.600}"
            ) from None
        if "because it is a symlink" in told:
            name = told.partition("'")[2].partition("'")[0]
            raise ZooError(f"{name}: a symlink; signatures are of files") from None
        raise ZooError(f"{folder}: {told:.300} (key {key}: PEM of P-256, P-384 or P-521 is taken)") from None
    except OSError as e:
        raise ZooError(f"{e.filename or folder}: {e.strerror or e}") from None
    except AttributeError:  # the library asks any key for its curve
        raise ZooError(f"{key}: a key of another kind; PEM of P-256, P-384 or P-521 is taken") from None
    except LookupError as e:
        raise ZooError(
            f"{folder / SIGNATURE}: no signature as model-signing writes it ({e!r:.200})"
        ) from None


def _differing(listed: str) -> str:
    """What the library lists, as Python spells a list, without the digests."""
    try:
        told = [str(x).partition(": Expected 'Digest(")[0] for x in ast.literal_eval(listed)]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return listed
    return "; ".join(told)
