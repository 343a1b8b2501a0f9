"""What every test of this folder leaves behind: nothing."""

from collections.abc import Iterator

import pytest

from tests.moments import seed
from tests.native.training import stop_servers


def pytest_report_header() -> str:
    return f"KILL_SEED={seed()}"


@pytest.fixture(autouse=True)
def _no_preloaded_process_outlives_its_test() -> Iterator[None]:
    yield
    stop_servers()
