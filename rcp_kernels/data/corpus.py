"""Text to calibrate and train on without a download: docstrings and comments of installed Python sources.

The demo measures perplexity on ``pydoc_data.topics``, a text about the same subject. Every paragraph that shares a run
of thirteen words with that text is dropped. 13-grams are the usual unit of contamination checks (Brown et al. 2020,
appendix C).
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import extras

__all__ = [
    "PACKAGES",
    "Corpus",
    "comment_corpus",
    "dataset_text",
    "docstring_corpus",
    "file_text",
    "held_out_default",
    "python_questions",
    "split_windows",
    "without_overlap",
]

PACKAGES = ("stdlib", "numpy", "torch")
"""The packages of the default corpus: the standard library, and two that every user of rcp_kernels has installed."""

# Skip the held-out text itself, tests, and folders that hold copies of other projects.
_SKIPPED_FOLDERS = {"pydoc_data", "test", "tests", "testing", "idlelib", "site-packages", "_vendor", "__pycache__"}
_NGRAM = 13
# Characters. The tens of thousands of shorter docstrings say little ("See base class.").
_SHORTEST = 200
_WORDS = re.compile(r"[a-z0-9]+")
# A comment counts as prose if this share of its white-space separated parts are words. Commented-out code has fewer.
_PROSE_WORD = re.compile(r"[(\"'`]*[A-Za-z][a-z'-]*[.,;:!?)\"'`]*")
_PROSE_SHARE = 0.7
_BANNER = re.compile(r"copyright|licen[sc]e|all rights|warrant", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Text, and numbers that identify it.

    Attributes:
        documents: one string each.
        dropped: number of paragraphs left out because they share 13 words in a row with the excluded text.
    """

    documents: tuple[str, ...]
    dropped: int

    @property
    def text(self) -> str:
        """The documents, separated by empty lines."""
        return "\n\n".join(self.documents)

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def _sources(package: str) -> Iterator[Path]:
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"docstring_corpus: {package!r} must be an installed package, got no package of that name; install it "
                f"or leave it out of packages"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield path


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Everything in a syntax tree that can have a docstring, breadth first, in the order of ``ast.walk``.

    Only statements are visited. Expressions are most of a tree and contain no definitions: 3000 files take 0.5 instead
    of 5 CPU seconds.
    """
    queue: deque[Any] = deque([tree])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("body", "cases", "handlers", "orelse", "finalbody"):
            queue.extend(getattr(node, field, ()))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        # Parsed, not imported: imports would open a web browser (antigravity) and take minutes for torch.
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in _definitions(tree):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= _SHORTEST:
            yield docstring.strip()


def _ngrams(text: str) -> set[int]:
    words = _WORDS.findall(text.lower())
    return {hash(tuple(words[i : i + _NGRAM])) for i in range(len(words) - _NGRAM + 1)}


def _comments(path: Path) -> Iterator[str]:
    """Runs of lines that contain only a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):
        return
    run: list[str] = []
    for line in [*lines, ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            run.append(stripped.lstrip("#!").removeprefix(" "))
        elif run:
            comment = "\n".join(run).strip()
            run = []
            if len(comment) >= _SHORTEST and not _BANNER.search(comment):
                words = comment.split()
                if sum(_PROSE_WORD.fullmatch(word) is not None for word in words) >= _PROSE_SHARE * len(words):
                    yield comment


def held_out_default() -> str:
    """The text that the demo measures perplexity on: the topics of pydoc's ``help()``."""
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())


def without_overlap(documents: Iterable[str], exclude: str | None = None, keep_repeated: bool = False) -> Corpus:
    """Documents without repeated paragraphs, and without paragraphs that share a run of 13 words with a text.

    Args:
        documents: one string each, paragraphs separated by empty lines. A document with fewer than 200 characters left
            is dropped.
        exclude: the text; None for pydoc's topics, the demo's held-out text.
        keep_repeated: keep repeated paragraphs. Without them, the steps of an answer have gaps.
    """
    forbidden = _ngrams(held_out_default() if exclude is None else exclude)
    seen: set[bytes] = set()
    kept: list[str] = []
    dropped = 0
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            # Many docstrings describe their arguments in the same words.
            key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if key in seen and not keep_repeated:
                continue
            seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        # Checked over the whole document as well: a run of words may cross two paragraphs.
        if forbidden & _ngrams(text):
            allowed = [paragraph for paragraph in paragraphs if not forbidden & _ngrams(paragraph)]
            dropped += len(paragraphs) - len(allowed)
            text = "\n\n".join(allowed)
            if forbidden & _ngrams(text):
                dropped += len(allowed)
                continue
        if len(text) >= _SHORTEST:
            kept.append(text)
    return Corpus(tuple(kept), dropped)


def docstring_corpus(packages: Sequence[str] = PACKAGES, exclude: str | None = None) -> Corpus:
    """All docstrings of at least 200 characters of whole packages, each once.

    The order is fixed: packages as given, files sorted by path, and each file's syntax tree breadth first. Files are
    parsed, not imported. The text depends on the installed versions; :attr:`Corpus.sha256` tells two texts apart.

    Args:
        packages: names of installed packages. "stdlib" is the running Python's library without its tests.
        exclude: paragraphs that share a run of 13 words with this text are dropped. None for pydoc's topics, the
            demo's held-out text.

    Raises:
        ValueError: a package is not installed.
    """
    files = (path for package in packages for path in _sources(package))
    # The garbage collector would traverse every syntax tree several times while it is built. Trees have no cycles.
    # Without it, parsing 3000 files takes 6 instead of 15 CPU seconds.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return without_overlap((text for path in files for text in _docstrings(path)), exclude)
    finally:
        if enabled:
            gc.enable()


def comment_corpus(packages: Sequence[str] = PACKAGES, exclude: str | None = None) -> Corpus:
    """The comments of whole packages that are prose; arguments and order as in :func:`docstring_corpus`.

    A comment is a run of lines that begin with ``#``. It has at least 200 characters, at least 70 % of its parts
    between white space are words, and it contains no word of a licence.
    """
    files = (path for package in packages for path in _sources(package))
    return without_overlap((text for path in files for text in _comments(path)), exclude)


def python_questions() -> list[str]:
    """Questions about Python for a model to answer: four for each keyword, builtin and standard module."""
    import builtins
    import keyword

    names = [f"the keyword `{name}`" for name in (*keyword.kwlist, *keyword.softkwlist) if name != "_"]
    names += [f"the builtin `{name}`" for name in sorted(dir(builtins)) if not name.startswith("_")]
    names += [f"the standard module `{name}`" for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
    forms = (
        "Explain {} of Python.",
        "How does {} of Python work in detail?",
        "When is {} of Python used, and what must be kept in mind?",
        "Write a page of reference documentation on {} of Python, in full sentences.",
    )
    return [form.format(name) for form in forms for name in names]


def file_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: the file is not UTF-8, or holds only white space.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} must be UTF-8, got another byte at {error.start}; convert the file") from None
    if not text.strip():
        raise ValueError(f"text: {path} must hold text, got {len(text)} characters of white space; pass another file")
    return text


def dataset_text(name: str, split: str, characters: int) -> str:
    """The first ``characters`` characters of a dataset's column ``text``; "wikitext" is wikitext-2-raw-v1.

    Args:
        name: a dataset on the hub or a local one; ``name:configuration`` selects one of several configurations.
        split: "train", "validation" or "test".
        characters: reading stops at the row that reaches this number.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
        ValueError: the dataset has no column ``text``, or the split has no text.
    """
    extras.require("datasets")
    from datasets import load_dataset

    if name == "wikitext":
        name = "Salesforce/wikitext:wikitext-2-raw-v1"
    name, _, configuration = name.partition(":")
    rows: Iterable[dict[str, Any]] = load_dataset(name, configuration or None, split=split, streaming=True)
    parts: list[str] = []
    length = 0
    for row in rows:
        if "text" not in row:
            raise ValueError(f"dataset {name}: a column named text is needed, got {sorted(row)}; export it to a file")
        parts.append(row["text"])
        length += len(row["text"])
        if length >= characters:
            break
    text = "".join(parts)
    if not text.strip():
        raise ValueError(f"dataset {name}: split {split} must hold text, got none; choose another split")
    return text


def split_windows(ids: Tensor, length: int, seed: int = 0) -> Tensor:
    """Cut int64 [tokens] into shuffled windows, int64 [windows, length]. Tokens after the last full one are dropped.

    Raises:
        ValueError: ids is not 1-D, or too short for one window.
    """
    if ids.dim() != 1 or ids.numel() < length:
        raise ValueError(
            f"text: at least one window of {length} tokens is needed, got shape {tuple(ids.shape)}; pass more text or "
            f"shorter windows"
        )
    windows = ids[: ids.numel() // length * length].view(-1, length)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
