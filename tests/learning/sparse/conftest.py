import pytest
from fedbonsai.learning.sparse.kernels import native


@pytest.fixture(scope="session")
def native_library():
    """The native kernels, built if this machine has not built them yet; without a compiler the test is skipped."""
    if reason := native.build():
        pytest.skip(reason)
