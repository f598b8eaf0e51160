import pytest

from tests.terminal.processes import in_process
from tests.tiny_model import save_tiny


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    """A cache folder that these tests share, so that later ones start from compiled programs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_positions=1 << 16))


@pytest.fixture
def kvjax_here(tmp_path, monkeypatch, capsys):
    """The command line in this process."""
    return in_process(tmp_path, monkeypatch, capsys)
