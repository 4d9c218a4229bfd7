"""One workspace for all tests of a module; nothing in it is changed."""

from pathlib import Path

import pytest

from tests.convert.made import make_workspace


@pytest.fixture(scope="package")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("convert"))
