import pytest


@pytest.fixture(scope="module")
def served(tiny):
    """The tiny run, served for all tests of a module."""
    pytest.importorskip("uvicorn", reason="serving needs starlette and uvicorn")
    import local_server

    with local_server.serve(tiny.run) as found:
        yield found
