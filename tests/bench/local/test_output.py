from pathlib import Path

import pytest

from malora_dist.bench.local.output import Output
from malora_dist.errors import ConfigError


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    Output().check()
    Output(tmp_path / "new.json").check()
    (tmp_path / "old.md").touch()
    with pytest.raises(ConfigError, match="--markdown .*old.md exists, and is not overwritten"):
        Output(markdown=tmp_path / "old.md").check()
    with pytest.raises(ConfigError, match="--json .* is in a folder that does not exist"):
        Output(tmp_path / "none" / "x.json").check()
