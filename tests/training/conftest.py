from pathlib import Path

import pytest

from tests.models import tiny_llama
from tests.tokenizers import save


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")
