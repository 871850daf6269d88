"""What every test run does besides pytest's own work."""

import gc
import signal


def pytest_configure():
    """Let Ctrl-C interrupt, also in a job in the background, where a shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Notebooks first: the longest of all tests, and nobody waits for one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/notebooks/"))


def pytest_collection_finish():
    """What is imported by now stays: training collects garbage, and need not look through that."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Say how many of the fault table's cases are answered well."""
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if report.nodeid.startswith("tests/faults/")
    ]
    if cases := {report.nodeid for report in reports}:
        wrong = {report.nodeid for report in reports if not report.passed}
        well = len(cases) - len(wrong)
        terminalreporter.write_line(f"faults: {well} of {len(cases)} cases answered well")
