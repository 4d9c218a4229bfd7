import logging

import pytest

from malora_dist.ops.bitsandbytes_import import LOGGER, OPTIONAL_KERNEL, without_kernel_warning


def test_one_warning_is_left_out_while_bitsandbytes_is_imported(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(LOGGER)
    before = logger.filters[:], logger.level, logger.handlers[:], logger.propagate
    with without_kernel_warning():
        logger.warning("%s: %s", OPTIONAL_KERNEL, "No module named 'kernels'")
        logger.warning("the library is not built for this machine")
    assert caplog.messages == ["the library is not built for this machine"]
    assert (logger.filters, logger.level, logger.handlers, logger.propagate) == before
    logger.warning(OPTIONAL_KERNEL)
    assert caplog.messages[1:] == [OPTIONAL_KERNEL]
