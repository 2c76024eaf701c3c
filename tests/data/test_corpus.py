"""Text from installed sources: what is taken, what is dropped, and its windows."""

import pydoc_data.topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels.data import corpus


def test_the_corpus_shares_no_thirteen_words_with_the_held_out_text():
    held_out = "\n".join(pydoc_data.topics.topics.values())
    text = corpus.docstring_corpus(("stdlib",))
    comments = corpus.comment_corpus(("stdlib",))
    assert len(text.text) > 500_000
    assert len(comments.text) > 100_000
    assert text.dropped > 0
    assert not corpus._ngrams(text.text + comments.text) & corpus._ngrams(held_out)


def test_the_corpus_is_the_same_again():
    one, again = (corpus.docstring_corpus(("json", "email")) for _ in range(2))
    assert one == again
    assert len(one.documents) > 10


COMMENTS = """\
# Copyright of somebody. {words}

{words}  # {words}
# x = f(a[1], b[2]) + g(c[3], d[4]); y = {{e: 5, f: 6}}; z = h(x, y) * 7 ** 8; print(x, y, z, 9, 10, 11, 12, 13, 14)
# for i in range(10): a[i] = b[i] + c[i]; d[i] = e[i] - f[i]; if a[i] > d[i]: g(a[i], d[i], i); else: h(b[i], c[i], i)

    # {words}
    #
    # Another paragraph.
def f(): ...
"""


def test_comments_are_taken_where_they_are_prose(tmp_path, monkeypatch):
    words = "These are words of a comment, and enough of them that it says something. " * 3
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(COMMENTS.format(words=words))
    (tmp_path / "package" / "latin.py").write_bytes(b"# \xe9" + words.encode())
    monkeypatch.syspath_prepend(tmp_path)
    assert corpus.comment_corpus(("package",)).documents == (f"{words.strip()}\n\nAnother paragraph.",)
    assert corpus.comment_corpus(("package",), exclude=words).documents == ()


def test_ngrams_are_runs_of_thirteen_words():
    words = [f"w{i}" for i in range(20)]
    runs = corpus._ngrams(" ".join(words))
    assert len(runs) == 8
    assert len(runs & corpus._ngrams(" ".join(words[:13]))) == 1
    assert not corpus._ngrams(" ".join(words[:12]))


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match="must be an installed package"):
        corpus.docstring_corpus(("no_such_package_here",))


@given(st.integers(1, 400), st.integers(1, 20))
def test_windows_are_the_stream_cut_and_shuffled(tokens, length):
    ids = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(ValueError, match=f"window of {length} tokens"):
            corpus.split_windows(ids, length)
        return
    windows = corpus.split_windows(ids, length)
    assert windows.shape == (tokens // length, length)
    assert torch.equal(windows[windows[:, 0].argsort()].flatten(), torch.arange(tokens // length * length))


def test_text_files_must_be_utf8_and_not_empty(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        corpus.file_text(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="must hold text"):
        corpus.file_text(path)
