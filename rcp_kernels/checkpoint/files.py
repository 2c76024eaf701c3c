"""The files of a quantized model's directory: their names, and the atomic replacement of a directory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from .config import read_quantization_config

__all__ = ["check_output", "file_sha256", "flush", "take_name"]

# A quantized model's files. A replacement deletes the old directory, and is refused if there are other files.
_FILES = re.compile(
    r"(config|generation_config|report|processor_config|preprocessor_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|normalizer|chat_template)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|README\.md|recipe\.yaml|curve\.(csv|png)|log\.jsonl|merges\.txt|vocab\.txt|chat_template\.jinja"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model"
)


def check_output(directory: str | Path) -> None:
    """Refuse a directory that :func:`save_quantized` could not replace. Call this before hours of work.

    Raises:
        ValueError: the directory exists and is neither empty nor a quantized model without other files; or it is, or
            holds, the working directory.
        OSError: the directory cannot be made.
    """
    directory = Path(directory).resolve()
    if Path.cwd().is_relative_to(directory):
        raise ValueError(
            f"save_quantized: {directory} must not be the working directory or hold it, as it is replaced, got "
            f"{Path.cwd()}; choose a directory inside it"
        )
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_quantized: {directory} must be a directory, got a file; choose another name")
    if directory.is_dir() and any(directory.iterdir()):
        try:
            read_quantization_config(directory)
        except ValueError as error:
            raise ValueError(
                f"save_quantized: {directory} must be empty or hold a quantized model to be replaced, got other files: "
                f"{str(error).partition('; ')[0]}; choose another directory"
            ) from None
        stray = sorted(path.name for path in directory.iterdir() if path.is_dir() or not _FILES.fullmatch(path.name))
        if stray:
            raise ValueError(
                f"save_quantized: {directory} must hold nothing but a quantized model to be replaced, got {stray[0]!r} "
                f"({len(stray)} such); move it away or choose another directory"
            )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise OSError(
            f"save_quantized: {directory.parent} must be a directory that can be written to, got {error}; choose "
            f"another"
        ) from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file, hexadecimal. The file is read in parts of 4 MB."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def flush(path: Path) -> None:
    """Write a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_name(temporary: Path, directory: Path) -> None:
    """Rename a directory onto another. A rename cannot replace a directory with content: that one is renamed first."""
    if not directory.exists():
        os.rename(temporary, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    old = aside / "model"
    try:
        os.rename(directory, old)
        os.rename(temporary, directory)
    except BaseException as error:
        if old.exists() and not directory.exists():
            try:
                os.rename(old, directory)
            except OSError:
                raise OSError(
                    f"save_quantized: {directory} must be replaced, got {error}; what was there is in {old}: move it "
                    f"back"
                ) from error
        if not old.exists():
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
