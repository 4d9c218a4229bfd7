"""Where converted models and tokenised tasks are kept between runs."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """$MALORA_CACHE, or ~/.cache/malora_dist."""
    return Path(os.environ.get("MALORA_CACHE", "~/.cache/malora_dist")).expanduser()
