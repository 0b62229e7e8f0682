"""Files that are whole or absent."""

import os
import stat

import pytest

from fastres.files import replaced


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to("folder/real")
    with replaced(link) as file:
        file.write("new")
    assert link.is_symlink() and real.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["real"]


def test_what_is_no_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replaced(pipe) as file:
        file.write("new")
    assert os.read(reader, 9) == b"new" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
