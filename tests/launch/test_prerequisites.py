import sysconfig

import pytest

from launch import prerequisites


def test_what_is_missing_is_named_with_its_package_and_what_is_lost(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert prerequisites.main() == 0  # slower, but it goes on
    said = capsys.readouterr().err
    assert "libjpeg headers (jpeglib.h) missing" in said
    assert "apt-get install libjpeg-dev" in said
    assert "apt-get install python3-dev" in said
    assert "apt-get install gcc" in said
    assert "libaio headers (libaio.h) missing: no offloading to NVMe; to have it: apt-get install libaio-dev" in said


@pytest.mark.parametrize("present", [True, False])
def test_libjpeg_headers_are_asked_of_the_compiler(monkeypatch, tmp_path, present):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\ngrep -q jpeglib && exit {0 if present else 1}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert ("libjpeg headers (jpeglib.h)" not in prerequisites.missing()) == present


def test_an_old_python_stops_it(monkeypatch, capsys):
    monkeypatch.setattr(prerequisites.sys, "version_info", (3, 10, 0))
    assert prerequisites.main() == 1
    assert "missing: Python >= 3.11; cannot go on" in capsys.readouterr().err
