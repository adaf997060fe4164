"""Files appear complete or not at all, and only where asked."""

import errno
import os
import resource
import subprocess
import sys
import textwrap

import pytest

from diffaccel.files.output import OutputError, OutputFolder, safe_name, write_file, write_text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red square", "a-red-square"),
        ("../../etc/passwd", "etc-passwd"),
        ("/absolute\\path", "absolute-path"),
        ("..", "image"),
        ("", "image"),
        ("日本", "image"),
        ("nul\x00 new\nline", "nul-new-line"),
        ("Crème brûlée", "creme-brulee"),
        ("x" * 500, "x" * 48),
    ],
)
def test_names_cannot_lead_anywhere(text, name):
    assert safe_name(text) == name


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/b.png", "..", "", "."])
def test_claim_stays_in_the_folder(tmp_path, name):
    with pytest.raises(OutputError, match="plain file name"):
        OutputFolder(tmp_path).claim(name)


def test_claim_does_not_follow_a_link_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.png").symlink_to(tmp_path / "precious.png")
    (tmp_path / "precious.png").write_text("precious")
    with pytest.raises(OutputError, match="plain file name"):
        OutputFolder(tmp_path / "out", overwrite=True).claim("x.png")


def test_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(OutputError, match="exists already"):
        OutputFolder(tmp_path).claim("x.txt")
    with pytest.raises(OutputError, match="exists already"):
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new", overwrite=True)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_file_that_appears_while_another_is_written_is_kept(tmp_path):
    path = tmp_path / "a.txt"

    def write(file):
        path.write_text("of another program")
        file.write(b"ours")

    with pytest.raises(OutputError, match="exists already"):
        write_file(path, write)
    assert path.read_text() == "of another program"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, write, overwrite=True)
    assert path.read_text() == "ours"


def test_file_systems_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    write_text(tmp_path / "a.txt", "ours")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "ours")]


def test_results_have_ordinary_permissions(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, half, overwrite=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_full_disk_leaves_nothing(tmp_path):
    """A real refusal by the system: the process may write files of 1,000 bytes at most."""
    script = f"""
        import resource, pathlib, diffaccel.files.output as output
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            output.write_file(pathlib.Path({str(tmp_path)!r}) / "x.png", lambda file: file.write(bytes(5000)))
        except output.OutputError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("x.png: file too large.")
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_read_only_folder_is_said_at_once(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # a superuser may write to folders without permission
    with pytest.raises(OutputError, match="read-only file system"):
        OutputFolder(tmp_path)


def test_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"):
        OutputFolder(tmp_path / "file" / "out")
