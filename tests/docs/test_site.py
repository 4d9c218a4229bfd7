"""The documentation builds into a site, without a warning and without asking another host."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.multiprocess import ROOT

# Whoever asks the network finds no one there.
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("material") is None, reason='needs the extra docs: pip install "malora_dist[docs]"')
def test_the_site_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (NO_NETWORK | {"NO_MKDOCS_2_WARNING": "1"}).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and (tmp_path / "site" / "library.html").is_file(), done.stderr
