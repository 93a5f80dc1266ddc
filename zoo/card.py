"""The model card of an exported folder: `README.md`, with the Hub's metadata and what is known of the weights.

Everything in it is read from the canonical folder: where its weights came from, what was done to them, and what its certificate
says. What nobody said is not guessed: a licence that is not known is called so, and a relation to the base model stands there
only where it is one of the Hub's (weights that were trained or merged are a `finetune`; a copy is none of them).

A README that came with the source goes along as `README.source.md`, to the byte: its authors' words are theirs, and
are not mixed with ours. Facts of its metadata (licence, language, task) are taken over, if they look like such.

Unusual here: texts of others (names, revisions, what a certificate says) stand in code spans, in which markdown has nothing to
obey; metadata is written by huggingface_hub, and holds only what passed a pattern. The card's first comment has a hash of the card,
so that one that nobody has edited is replaced by the next, and one that somebody has edited is kept as theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import manifest
from zoo._version import __version__
from zoo.errors import ZooError
from zoo.formats.base import read_json, read_small
from zoo.formats.canonical import VALUES, Canonical
from zoo.manifest import Manifest
from zoo.verify import certificate

FILE = "README.md"
THEIRS = "README.source.md"
MAX_HEAD = 1 << 16
"""Bytes of a card in which its metadata is looked for; the longest on the Hub have some 30 kB, of results."""
MAX_CARD = 1 << 24
"""Bytes of a card of ours: some hundred for each file of the release."""
MAX_SAID = 200
"""Characters of somebody else's text."""

_MARK = re.compile(r"<!-- zoo card ([0-9a-f]{64}) -->")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(/|$)", re.ASCII)
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}|code|multilingual", re.ASCII)
_LINK = re.compile(r"https://[\w./%~-]{1,200}|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]{0,40}", re.ASCII)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LICENCES = {
    "Gemma Terms of Use": "gemma", "Llama 2 Community License": "llama2", "Meta Llama 3 Community License": "llama3",
    "Llama 3.1 Community License": "llama3.1", "Llama 3.2 Community License": "llama3.2", "Llama 3.3 Community License": "llama3.3",
    "Llama 4 Community License": "llama4", "Apache-2.0": "apache-2.0", "MIT": "mit",
}  # fmt: skip
"""Manifests' names of licences -> the Hub's (huggingface.co/docs/hub/repositories-licenses); the rest are `other` there."""


@dataclass(frozen=True)
class About:
    """What the folder alone does not say. `repo`: where it is pushed to. `problems`: what was found to be wrong with the
    certificate when all was hashed; None: nothing was hashed."""

    repo: str | None = None
    problems: Sequence[str] | None = None


@dataclass(frozen=True)
class _Export(About):
    """`exact`: the release's files, to the byte; `dtype`: what weights are converted to."""

    exact: bool = False
    dtype: str | None = None


def files(
    c: Canonical, carried: Sequence[str], exact: bool, dtype: str | None, about: About
) -> tuple[dict[str, bytes], list[str]]:
    """The card, and the README of the source under its other name; and which `carried` files then still go along as they are.
    `exact`: what is exported are the release's files, to the byte; `dtype`: what its weights are converted to."""
    what = _Export(about.repo, about.problems, exact, dtype)
    theirs = read_small(c.root, FILE) if FILE in carried else None
    rest = [n for n in carried if n != FILE]
    out = {FILE: _card(c, theirs, what, rest)}
    if theirs is not None and not is_ours(theirs):
        name, n = THEIRS, 1
        while name in rest:  # one that came along from a folder before
            name, n = f"README.source-{n + 1}.md", n + 1
        out[name] = theirs
    return out, rest


def of_an_export(root: Path, names: Iterable[str]) -> set[str]:
    """The READMEs among the files of a folder that zoo exported: they are about that folder, and no part of the release."""
    path = root / FILE
    if not (path.is_file() and path.stat().st_size < MAX_CARD and is_ours(path.read_bytes())):
        return set()
    return {n for n in names if n == FILE or n.startswith(THEIRS.removesuffix(".md"))}


def is_ours(card: bytes) -> bool:
    """Whether a README is a card that zoo wrote, and nobody has edited since."""
    text = card.decode("utf-8", "replace")
    found = _MARK.search(text[:MAX_HEAD])
    return found is not None and found[1] == _digest(text.replace(found[0], "", 1))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------
# What is known


@dataclass(frozen=True)
class _Base:
    """Where the weights began: a repository at a revision and commit, and the relation to it."""

    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    relation: str | None = None
    rounded: str | None = None  # the block type of GGUF in which its weights came


def _base(c: Canonical, said: Mapping[str, Any]) -> _Base:
    source = c.source
    trained = "finetune" if source["format"] == VALUES else None
    origin, values = source.get("origin"), source.get("values")
    if isinstance(origin, dict) and _is(_REPO, repo := origin.get("repo")):
        return _Base(repo, _text(origin.get("revision")), _text(origin.get("commit")), trained)
    if isinstance(values, dict) and isinstance(release := values.get("release"), str):
        repo, _, revision = release.partition("@")
        if _is(_REPO, repo):
            return _Base(repo, revision or None, None, trained)
    place = str(values.get("release", "") if isinstance(values, dict) else source.get("path", ""))
    if isinstance(origin, dict) and (found := _packaged(origin.get("package"))) is not None:
        return found
    if at := _CACHED.search(place):
        return _Base(f"{at[1]}/{at[2]}", at[3], at[3], trained)
    # Somebody's folder: what its own card says of its base is as true of what was made of it.
    if _is(_REPO, repo := said.get("base_model")):
        relation = said.get("base_model_relation")
        return _Base(repo, relation=trained or (relation if relation in _RELATIONS else None))
    return _Base()


def _packaged(package: object) -> _Base | None:
    """The release that a package holds, in weights that were rounded or not."""
    for m in manifest.load_all():
        for source in m.sources:
            if source.package is not None and source.package == package and m.repo:
                return _Base(
                    m.repo, relation="quantized" if source.quantization else None, rounded=source.quantization
                )
    return None


def _said(card: bytes | None) -> dict[str, Any]:
    """The metadata of a source's card; empty if there is none, or it is none."""
    import yaml  # huggingface_hub's own
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    head = (card or b"")[:MAX_HEAD].decode("utf-8", "replace").removeprefix("\ufeff")
    if (found := REGEX_YAML_BLOCK.search(head)) is None:
        return {}
    try:
        tokens = yaml.scan(found[2])
        if any(
            isinstance(t, yaml.AnchorToken | yaml.AliasToken) for t in tokens
        ):  # how a small text makes a large one
            return {}
        return dict(ModelCard(head, ignore_metadata_errors=True).data.__dict__)
    except Exception:  # YAML's errors, and those of values that the library did not foresee
        return {}


def _licence(
    said: Mapping[str, Any], known: Manifest | None, base: _Base, carried: Sequence[str]
) -> tuple[dict[str, str], str]:
    """The Hub's fields, and a sentence."""
    own = next((n for n in carried if n.upper().startswith(("LICENSE", "LICENCE"))), None)
    if _is(_SLUG, named := said.get("license")) and named != "unknown":
        fields = {"license": str(named)}
        if _is(_SLUG, name := said.get("license_name")):
            fields["license_name"] = str(name)
        if _is(_LINK, link := said.get("license_link")):
            fields["license_link"] = _reached(str(link), carried, base)
        return fields, f"{_code(fields.get('license_name', named))}, as the source's card says"
    if known is not None and known.licence:
        where = known.facts.get("licence", "")
        told = f"{_code(known.licence)}, by {_code(where)}" if where else _code(known.licence)
        if (hub := _LICENCES.get(known.licence)) is not None:
            return {"license": hub}, told
        name = re.sub("[^a-z0-9.]+", "-", known.licence.lower()).strip("-")
        link = {"license_link": _reached(own or "LICENSE", carried, base)} if own or base.repo else {}
        return {"license": "other", "license_name": name, **link}, told
    if own is not None and _is(_LINK, own):
        return {"license": "other", "license_link": own}, f"that of the source's file {_code(own)}"
    ask = f": see {_repo(base.repo)}" if base.repo else ""
    return {"license": "unknown"}, f"not known to zoo{ask}"


def _reached(link: str, carried: Sequence[str], base: _Base) -> str:
    """A licence's link from where the card will be."""
    if link.startswith("https:") or link in carried or base.repo is None:
        return link
    return f"https://huggingface.co/{base.repo}/blob/main/{link}"


def release_of(c: Canonical) -> tuple[Manifest | None, str | None]:
    """The release that a canonical folder was made of, where its source says so and zoo knows it; the block type of GGUF to
    which its weights had been rounded before, if they had been."""
    base = _base(c, {})
    return _known(base), base.rounded


def _known(base: _Base) -> Manifest | None:
    try:
        return None if base.repo is None else manifest.find(base.repo)
    except ZooError:
        return None


def _languages(said: Mapping[str, Any]) -> list[str]:
    told = said.get("language")
    told = told if isinstance(told, list) else [told]
    return [x for x in told[:200] if _is(_LANGUAGE, x)]


# ---------------------------------------------------------------------------------------------------
# The card


def _card(c: Canonical, theirs: bytes | None, what: _Export, carried: Sequence[str]) -> bytes:
    from huggingface_hub.repocard_data import ModelCardData

    said = _said(theirs)
    base = _base(c, said)
    fields, licence = _licence(said, _known(base), base, carried)
    task = said.get("pipeline_tag")
    data = ModelCardData(
        base_model=base.repo,
        base_model_relation=base.relation,
        language=_languages(said) or None,
        library_name="transformers",
        pipeline_tag=str(task) if _is(_SLUG, task) else "text-generation",
        tags=["zoo"],
        **fields,  # type: ignore[arg-type]
    )
    body = [
        f"# {_title(c, base, what)}",
        _opening(c, base, what),
        *(
            [f"The card that came with the source is [{THEIRS}]({THEIRS}), as its authors wrote it."]
            if theirs is not None and not is_ours(theirs)
            else []
        ),
        "## Where it comes from",
        _table(("", ""), _facts(c, base, licence, what)),
        *_source_files(c),
        *_certificate(c, what),
        *_commands(what),
    ]
    head = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n"
    rest = "\n\n" + "\n\n".join(body) + "\n"
    return f"{head}<!-- zoo card {_digest(head + rest)} -->{rest}".encode()


def _title(c: Canonical, base: _Base, what: _Export) -> str:
    if what.repo or base.repo:
        return _plain(what.repo or str(base.repo).partition("/")[2])
    return f"A model of family {_code(c.spec.family)}"


def _opening(c: Canonical, base: _Base, what: _Export) -> str:
    of = _repo(base.repo) if base.repo else "a checkpoint whose repository is not known"
    by = "zoo, a toolkit that converts and verifies checkpoints"
    if c.source["format"] == VALUES:
        values = c.source.get("values")
        how = _code(values.get("by", "") if isinstance(values, dict) else "")
        return f"Weights that were trained or merged ({how}), starting from {of}: no release's own. Written by {by}."
    if base.rounded:
        return f"The weights of {of}, which came rounded to {_code(base.rounded)}, in new files under the names that transformers reads, written by {by}."
    if what.exact and _bytes_hold(c, what):
        return f"The files of {of}, byte for byte, written by {by}, which added this card."
    if what.exact:
        return f"The files of {of}, put together again by {by}, which added this card. No certificate says that no byte is another."
    return f"The weights of {of} in new files, under the names that transformers reads, written by {by}."


def _facts(c: Canonical, base: _Base, licence: str, what: _Export) -> Iterable[tuple[str, str]]:
    source = c.source
    if base.repo:
        at = base.commit or base.revision
        yield "source", _repo(base.repo) + (f" at {_code(at)}" if at else "")
    package = source.get("origin")
    if isinstance(package, dict) and "repo" not in package and "package" in package:
        yield "source", f"PyPI's {_code(package['package'])} {_code(package.get('version', ''))}"
    yield "source's format", _code("trained" if source["format"] == VALUES else source["format"])
    yield "family", f"{_code(source['family'])}, rules {_code(source.get('rules', ''))}"
    yield "written by", f"zoo {__version__}; converted by {_code(c.json.get('zoo_version', ''))}"
    quant = c.quant if what.exact else c.codes  # blocks of a GGUF are numbers in new files
    expanded = {*c.quant} - {*quant}
    stored = {
        "F32" if n.rpartition(".")[0] in expanded and t.dtype == "U8" else t.dtype
        for n, t in c.tensors.items()
    }
    dtypes = sorted(stored if what.dtype is None else {what.dtype})
    changed = source.get("dtype") is not None or what.dtype is not None or bool(expanded)
    yield "weights", ", ".join(map(_code, dtypes)) + (" (converted)" if changed else "")
    if quant:
        yield "quantised", ", ".join(map(_code, sorted(set(quant.values()))))
    yield "licence", licence


def _source_files(c: Canonical) -> list[str]:
    """Hashes of the source's files: those of the repository's list, else the certificate's."""
    origin = c.source.get("origin")
    listed = origin.get("files") if isinstance(origin, dict) else None
    if not isinstance(listed, dict):
        listed = _lists(_read(c)).get("source", {})
    rows = [
        (_code(n), _code(f.get("sha256") or f"git {f.get('git_sha1', 'not known')}"))
        for n, f in sorted(listed.items())
        if isinstance(f, dict)
    ]
    return _folded("SHA-256 of the source's files", rows) if rows else []


def _read(c: Canonical) -> dict[str, Any]:
    path = c.root / certificate.FILE
    try:
        return read_json(path, "it is the certificate") if path.is_file() else {}
    except ZooError:
        return {}


def _lists(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of the certificate's two sides."""
    out = {}
    for side in ("canonical", "source"):
        part = said.get(side)
        held = part.get("files") if isinstance(part, dict) else None
        out[side] = held if isinstance(held, dict) else {}
    return out


def _certificate(c: Canonical, what: _Export) -> list[str]:
    said = _read(c)
    if not said:
        return ["## Certificate", "None: nobody has compared these weights with upstream's implementation."]
    try:
        rows = [_level(name, level) for name, level in said["levels"].items()]
        oracle = said["oracle"]
        verdict = str(said["verdict"])
        told = f"{_code(verdict)} on {_code(said['created'])}, in {_code(said['dtype'])}, against {_code(oracle['kind'])} "
        told += (
            f"{_code(oracle.get('version') or '')} {_code(oracle.get('class') or oracle.get('name') or '')}"
        )
        stands = _stands(c, what)
    except (ZooError, *certificate.ODD):
        return [
            "## Certificate",
            f"Its {_code(certificate.FILE)} is not as zoo writes it: nothing is proven.",
        ]
    digest = certificate.sha256(c.root / certificate.FILE)
    what_of = "the canonical folder that this was exported from" + (
        f", before its weights were converted to {_code(what.dtype)}" if what.dtype else ""
    )
    missing = [f"Not checked: {_code(x)}" for x in said.get("not_checked") or [] if isinstance(x, str)]
    hashes = [
        (_code(n), _code(f.get("sha256", ""))) for n, f in sorted(_lists(said)["canonical"].items()) if isinstance(f, dict)
    ]  # fmt: skip
    return [
        "## Certificate",
        f"Of {what_of}: {told}. {stands}",
        _table(("level", "verdict", "tightest check", "value", "bound", "bound from"), rows),
        *missing,
        f"{_code(certificate.FILE)} has SHA-256 {_code(digest)}.",
        *_folded("SHA-256 of the canonical files that it is of", hashes),
    ]


def _stands(c: Canonical, what: _Export) -> str:
    """Whether the certificate is still one of these weights."""
    if what.problems:
        return "**It does not hold**: " + "; ".join(map(_code, what.problems[:8])) + "."
    if what.problems is not None:
        return "It holds: every canonical file that it names was hashed again before this was uploaded."
    if why_not := certificate.doubts(_read(c)):
        return "**It proves nothing**: " + _code(why_not[0]) + "."
    told = certificate.standing(c.root) or ""
    if told.startswith("not as it is now"):
        return "**The folder has been changed since**, so it is not of these weights: " + _code(told) + "."
    return "Sizes and times of the files are as they were then."


def _bytes_hold(c: Canonical, what: _Export) -> bool:
    """Whether a certificate that is of this folder as it is says that every byte is the source's."""
    try:
        said = _read(c)
        sound = said["levels"]["bytes"]["verdict"] == "passed" and not certificate.doubts(said)
        told = certificate.standing(c.root) or ""
    except (ZooError, *certificate.ODD):
        return False
    return sound and not what.problems and not told.startswith("not as it is now")


def _level(name: str, level: Mapping[str, Any]) -> tuple[str, ...]:
    checks = [certificate.Check.from_json(x) for x in level["checks"]]
    tight = certificate.Level(name, checks).tightest
    if tight is None:
        return _code(name), _code(level["verdict"]), "", "", "", ""
    relation = ">=" if tight.at_least else "<="
    return (
        _code(name), _code(level["verdict"]), _code(tight.name), f"{tight.value:.3g}", _code(f"{relation} {tight.bound:.3g}"),
        _code(tight.why),
    )  # fmt: skip


def _commands(what: _Export) -> list[str]:
    folder = "model" if what.repo else "FOLDER"
    lines = [f"zoo convert {folder} canonical", "zoo verify canonical"]
    if what.repo:
        lines = [f"hf download {what.repo} --local-dir model", f"zoo check model {what.repo}", *lines]
    return [
        "## Check it",
        "Whole and unaltered, and what transformers computes from it is what zoo does:"
        if what.repo
        else "What transformers computes from it is what zoo does:",
        "```sh\n" + "\n".join(lines) + "\n```",
    ]


# ---------------------------------------------------------------------------------------------------
# Text


def _is(pattern: re.Pattern[str], x: object) -> bool:
    return isinstance(x, str) and pattern.fullmatch(x) is not None


def _text(x: object) -> str | None:
    return x if isinstance(x, str) else None


def _repo(repo: str | None) -> str:
    """A link to a repository whose name has passed its pattern."""
    return f"[{_plain(str(repo))}](https://huggingface.co/{repo})"


def _plain(name: str) -> str:
    """Such a name as text."""
    return name.replace("_", "\\_")


def _code(x: object) -> str:
    """A text of others as a code span: one line, its backticks no end of it, its bars no column's (also for readers to whom two
    backslashes before a bar are one, and the bar a column's)."""
    text = " ".join("".join(ch if ch.isprintable() else " " for ch in str(x)).split()).replace("\\|", "\\ |")
    if not text:
        return ""
    if len(text) > MAX_SAID:
        text = text[: MAX_SAID - 3] + "..."
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}".replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _folded(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"<details><summary>{title}</summary>", _table(("file", "SHA-256"), rows), "</details>"]
