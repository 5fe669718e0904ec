"""Downloads that time out are tried again."""

import pytest

from adamerge import InputError
from adamerge.checkpoints import hub_folder
from adamerge.data import HubData
from adamerge.fetching import WAITS


class ReadTimeout(Exception):  # noqa: N818
    """As HTTP clients call theirs."""


class Busy(OSError):  # noqa: N818
    """An answer of a server, as the Hub's client raises it."""

    def __init__(self, code):
        super().__init__(f"{code} from the server")
        self.response = type("Answer", (), {"status_code": code})()


def behind(error):
    """What a library raises over an error of the library below it."""
    outer = OSError("not in the cache, and no answer")
    outer.__cause__ = error
    return outer


@pytest.fixture
def waits(monkeypatch):
    """Seconds waited."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def failing(errors, result):
    """Raises one error after another, then gives the result."""
    left = iter(errors)

    def fetch(*_, **__):
        if (error := next(left, None)) is not None:
            raise error
        return result

    return fetch


PASSING = {
    "timed out": TimeoutError(), "read timed out": ReadTimeout(), "behind another": behind(ReadTimeout()),
    "busy": Busy(503), "too many": behind(Busy(429)),
}  # fmt: skip
FINAL = {"not there": Busy(404), "no route": OSError("no route"), "refused": ConnectionRefusedError()}


@pytest.mark.parametrize("error", PASSING)
def test_what_passes_is_tried_again_a_few_times(tmp_path, monkeypatch, waits, caplog, error):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing([PASSING[error]] * len(WAITS), str(tmp_path)))
    assert hub_folder("some/model") == tmp_path
    assert waits == list(WAITS)
    assert caplog.text.count("some/model: ") == len(WAITS)


def test_the_last_time_out_is_an_error_that_names_the_repository(monkeypatch, waits):
    fails = failing([TimeoutError("slow")] * (len(WAITS) + 1), None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(InputError, match=r"'some/model' is no local .* fetched from the Hub \(TimeoutError\); check"):
        hub_folder("some/model")
    monkeypatch.setattr("datasets.load_dataset", failing([TimeoutError("slow")] * (len(WAITS) + 1), None))
    with pytest.raises(InputError, match="some/data, split 'test', cannot be opened: slow; check the name and the net"):
        HubData("some/data").dataset("test", None)
    assert waits == [*WAITS, *WAITS]


@pytest.mark.parametrize("error", FINAL)
def test_what_does_not_pass_is_said_at_once(monkeypatch, waits, error):
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing([FINAL[error]], None))
    with pytest.raises(InputError, match="'some/model' is no local file or folder"):
        hub_folder("some/model")
    assert not waits
