"""A pytest plugin that journals each test as it begins and ends: `pytest -p journal_tests --journal FILE` (and -n 8).

Lines are {"what": "test began", "id": ...} and {"what": "test", "id": ..., "outcome": passed, failed, skipped or error,
"seconds": ..., "message": ...}. A test that began and has no outcome was running when pytest was killed. Tests that the
file holds as passed or skipped are not run again, so that a run that was cut off goes on where it was.
"""

import pytest
from journal import Journal, read_journal

GOOD = ("passed", "skipped")
MESSAGE = 2000  # characters kept of a failure, its end


def pytest_addoption(parser):
    parser.addoption("--journal", default=None, help="append each test's outcome to this JSON-lines file")


def pytest_configure(config):
    path = config.getoption("--journal")
    if not path:
        return
    worker = getattr(config, "workerinput", None)
    if worker is None:
        journal = Journal(path)
        journal.write("machine", **_machine())
        config.pluginmanager.register(_Writer(journal), "journal writer")
        config.finished_tests = {
            line["id"] for line in read_journal(path) if line["what"] == "test" and line["outcome"] in GOOD
        }
    else:  # of pytest-xdist: all workers must choose the same tests, so the first process says which
        config.finished_tests = set(worker["finished_tests"])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["finished_tests"] = sorted(getattr(node.config, "finished_tests", ()))


def pytest_collection_modifyitems(config, items):
    finished = getattr(config, "finished_tests", set())
    left_out = [item for item in items if item.nodeid in finished]
    if left_out:
        items[:] = [item for item in items if item.nodeid not in finished]
        config.hook.pytest_deselected(items=left_out)


def _machine() -> dict:
    """Return what a record says of the machine and the versions."""
    import record
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = record.start("pytest", device, {}, "tests")
    return {name: found[name] for name in ("date", "device", "kind", "driver", "versions", "load")}


class _Writer:
    """Writes the lines, in the process that collects the reports."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.outcomes: dict[str, dict] = {}

    def pytest_runtest_logstart(self, nodeid, location):
        self.journal.write("test began", id=nodeid)

    def pytest_runtest_logreport(self, report):
        """Gather a test's set-up, call and tear-down; write the outcome after the last of them."""
        found = self.outcomes.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        found["seconds"] += report.duration
        if report.failed:
            found["outcome"] = "failed" if report.when == "call" else "error"
            found["message"] = report.longreprtext[-MESSAGE:]
        elif report.skipped and found["outcome"] == "passed":
            found["outcome"] = "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            found["message"] = reason[-MESSAGE:]
        if report.when == "teardown":
            found["seconds"] = round(found["seconds"], 3)
            self.journal.write("test", id=report.nodeid, **self.outcomes.pop(report.nodeid))

    def pytest_collectreport(self, report):
        if report.failed:
            self.journal.write(
                "test", id=report.nodeid, outcome="error", seconds=0.0, message=report.longreprtext[-MESSAGE:]
            )

    def pytest_sessionfinish(self, session, exitstatus):
        self.journal.write("tests ended", exit=int(exitstatus))
