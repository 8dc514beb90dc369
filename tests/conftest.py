"""Options, and which process runs which test. What the tests share is in `shared.py`."""

import os
import sys

import pytest

SOAK = "--soak" in sys.argv or os.environ.get("FINETUNE_SEARCH_SOAK") == "1"  # the second for pytest-xdist's workers
if SOAK:
    os.environ["FINETUNE_SEARCH_SOAK"] = "1"
# Several processes share the cores: OpenMP's threads must not spin while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Module fixtures that take seconds to make: pytest-xdist gives all tests that use one to the same worker.
DEAR = ("whole", "judged")


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, but not in a process that only hands tests to others: torch and Ray take 6 s to import."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="repeat kills and random examples as `make test-soak` does")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no core is idle at the end; others by file, for files share fixtures."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("bucket") == "s3":
            item.add_marker(pytest.mark.slow)  # its server takes seconds to start
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        dear = [name for name in DEAR if name in item.fixturenames]
        if dear or item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group(" ".join([item.location[0], *dear])))
        if getattr(item.obj, "is_hypothesis_test", False):
            item.add_marker(pytest.mark.soak)
