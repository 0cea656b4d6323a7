"""Messages of the package: for every user, never twice, and silent where Transformers is."""

import logging

from transformers.utils import logging as transformers_logging

import transformers_quip  # noqa: F401 - sets the package's logger up


def test_messages_reach_a_user_who_set_up_nothing(monkeypatch, capsys):
    """Without handlers on the root logger, INFO goes to stderr, unless Transformers was told to be quiet."""
    log = logging.getLogger("transformers_quip.test")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_warning()
        log.info("coverage")
        log.debug("detail")
        assert capsys.readouterr().err == "[transformers_quip.test] coverage\n"
        transformers_logging.set_verbosity_error()
        log.info("coverage")
        log.warning("careful")
        log.error("broken")
        assert capsys.readouterr().err == "[transformers_quip.test] broken\n"
    finally:
        transformers_logging.set_verbosity(verbosity)


def test_messages_of_an_application_with_logging_are_not_doubled(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logging.getLogger("transformers_quip.test").warning("careful")
    assert capsys.readouterr().err == ""
