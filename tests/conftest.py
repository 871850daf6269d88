"""What every test run prints besides pytest's own words."""


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
