"""bitsandbytes, imported without its warning about a kernel of the hub that nothing here calls."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "bitsandbytes.backends.cpu.ops"
# A product of 4-bit weights for CPUs, which has no gradient.
OPTIONAL_KERNEL = "Failed to load CPU gemm_4bit_forward"


@contextmanager
def without_kernel_warning() -> Iterator[None]:
    """Leave out that warning while bitsandbytes is imported; all others stay, and so does the caller's logging."""
    logger = logging.getLogger(LOGGER)
    logger.addFilter(_is_other)
    try:
        yield
    finally:
        logger.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OPTIONAL_KERNEL)
