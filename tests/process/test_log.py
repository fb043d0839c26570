"""The log's lines."""

import logging
import re

import pytest

from mlx_server import log
from mlx_server.errors import ServerError

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "


@pytest.fixture
def logger():
    root, ours = logging.getLogger(), logging.getLogger("mlx_server")
    before = root.handlers[:], root.level, ours.level
    yield logging.getLogger("mlx_server.part")
    root.handlers[:], root.level, ours.level = before
    logging.captureWarnings(False)


def test_an_entry_is_one_line_with_time_level_and_role(logger, capsys):
    log.configure("info", "engine")
    logger.info("request %s\nfinished", "r-1")
    logger.debug("not seen")
    assert re.fullmatch(LINE + r"INFO    engine: request r-1\\nfinished\n", capsys.readouterr().err)


def test_libraries_log_warnings_only(logger, capsys):
    log.configure("debug", "server")
    logging.getLogger("httpx").info("GET https://host/?token=secret")
    logging.getLogger("httpx").warning("slow")
    assert re.fullmatch(LINE + "WARNING server: slow\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("level", "error", "has_traceback"),
    [("info", ServerError("x"), False), ("debug", ServerError("x"), True), ("info", ZeroDivisionError(), True)],
)
def test_a_traceback_is_for_our_faults(level, error, has_traceback, logger, capsys):
    log.configure(level, "api")
    try:
        raise error
    except type(error):
        logger.exception("failed")
    assert ("Traceback" in capsys.readouterr().err) == has_traceback
