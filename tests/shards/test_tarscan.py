"""The walk through a tar: stock webdataset's samples, and offsets that hold."""

import hashlib
import io
import tarfile
import zlib

import pytest

from shards.store import open_store
from shards.tarscan import DamagedTarError, TarScan


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write(path, members, format=tarfile.USTAR_FORMAT, **kwargs):
    with tarfile.open(path, "w", format=format, **kwargs) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def scan(path, wanted=lambda extension: True, hashed=False):
    walk = TarScan(open_store(path.parent), path.name, wanted, hashed)
    return walk, list(walk)


NAMES = {
    "plain": ["a.jpg", "a.cls", "b.jpg", "b.json"],
    "folders": ["x/a.jpg", "x/a.cls", "y.z/a.jpg", "y.z/a.cls", "./c/d.jpg"],
    "extensions": ["a.JPG", "a.seg.PNG", "a.v1.2.json", "b.jpg", "b."],
    "one key twice": ["a.jpg", "b.jpg", "a.jpg"],
    "long": ["n" * 99 + ".jpg", "n" * 99 + ".cls", "d" * 90 + "/" + "k" * 140 + ".jpg"],
    "unicode": ["Ünïcødé näme/日本.jpg", "Ünïcødé näme/日本.cls", "a b.jpg"],
    "odd": ["../../etc/passwd.jpg", "/root/x.jpg", "a\\b.jpg"],
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("hashed", [False, True])
def test_samples_are_those_of_stock_webdataset(tmp_path, names, format, hashed):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    content = [(name, f"{name} {i}".encode() * (i * 97)) for i, name in enumerate(names)]
    try:
        path = write(tmp_path / "a.tar", content, format)
    except ValueError:
        assert format == tarfile.USTAR_FORMAT  # which has no long names
        return
    with open(path, "rb") as stream:
        stock = list(group_by_keys(tar_file_expander([{"url": "x", "stream": stream}])))
    walk, samples = scan(path, hashed=hashed)
    ours = [{"__key__": s.key, "__url__": "x", **{m.extension: m.data for m in s.members}} for s in samples]
    assert ours == stock
    assert not walk.skipped
    raw = path.read_bytes()
    for member in (member for sample in samples for member in sample.members):
        assert raw[member.offset : member.offset + member.size] == member.data
        assert zlib.crc32(raw[member.offset - 512 : member.offset]) == member.header


def test_only_what_is_wanted_is_kept_and_the_whole_is_hashed(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1" * 3_000_000), ("a.cls", b"7"), ("b.jpg", b"2" * 512)])
    for hashed in (False, True):
        walk, samples = scan(path, lambda extension: extension == "cls", hashed)
        assert [[m.data for m in s.members] for s in samples] == [[None, b"7"], [None]]
        assert walk.bytes == path.stat().st_size
        assert walk.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest() if hashed else "")
        assert walk.trailing == 0


def test_what_is_no_sample_is_counted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "d", type=tarfile.DIRTYPE)
        add(tar, "d/a.jpg", b"image")
        add(tar, "d/l.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "d/h.jpg", type=tarfile.LNKTYPE, linkname="d/a.jpg")
        add(tar, "dev.jpg", type=tarfile.CHRTYPE)
        add(tar, "fifo.jpg", type=tarfile.FIFOTYPE)
        add(tar, "README", b"hello")
        add(tar, "._a.jpg", b"of a Mac")
        add(tar, "__index__/x.json", b"{}")
        add(tar, "d/a.cls", b"1")
    walk, samples = scan(path)
    assert [(s.key, [m.extension for m in s.members]) for s in samples] == [("d/a", ["jpg", "cls"])]
    assert walk.skipped == {
        "folders": 1, "links": 2, "devices": 2, "files without extension": 1, "hidden files": 1, "metadata": 1,
    }  # fmt: skip


def test_two_members_with_one_extension_are_both_there(tmp_path):
    _, samples = scan(write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.JPG", b"2")]))
    assert [m.data for m in samples[0].members] == [b"1", b"2"]


def test_names_that_are_no_utf8_become_escapes(tmp_path):
    path = write(tmp_path / "a.tar", [("caf\udce9.jpg", b"1"), ("caf\udce9.cls", b"2")], tarfile.GNU_FORMAT)
    _, samples = scan(path)
    assert [s.key for s in samples] == ["caf\\xe9"]
    assert len(samples[0].members) == 2


def test_global_pax_headers_and_empty_tars(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1")], tarfile.PAX_FORMAT, pax_headers={"comment": "hi"})
    assert [s.key for s in scan(path)[1]] == ["a"]
    assert scan(write(tmp_path / "b.tar", []))[1] == []


@pytest.mark.parametrize("hashed", [False, True])
def test_every_cut_is_an_error_that_names_tar_and_offset(tmp_path, hashed):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1" * 700), ("b.jpg", b"2" * 512), ("n" * 120 + ".c", b"3")], 1)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(0, -(-end // 512) * 512 + 1, 64):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedTarError, match=r"a\.tar is (cut short at|no tar from) byte \d+"):
            scan(path, hashed=hashed)
    path.write_bytes(whole[: -(-end // 512) * 512 + 512])  # a single block of zeros is end enough
    assert len(scan(path, hashed=hashed)[1]) == 3


@pytest.mark.parametrize("hashed", [False, True])
def test_damaged_headers_are_errors(tmp_path, hashed):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1" * 700), ("b.jpg", b"2" * 512)])
    whole = bytearray(path.read_bytes())
    whole[1536 + 3] ^= 1  # where b's header begins
    path.write_bytes(whole)
    with pytest.raises(DamagedTarError, match=r"a\.tar is damaged at byte 1536: bad checksum"):
        scan(path, hashed=hashed)
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DamagedTarError, match=r"a\.tar is no tar from byte 0 on"):
        scan(path, hashed=hashed)


def test_a_size_beyond_the_tar_takes_no_memory(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 60
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    with pytest.raises(DamagedTarError, match=r"cut short at byte 0: 'a\.jpg' there claims"):
        scan(path)
    info.type = tarfile.XHDTYPE
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    with pytest.raises(DamagedTarError, match=r"a\.tar"):
        scan(path)


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz"])
def test_compressed_tars_are_told_apart(tmp_path, packer):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{packer}") as tar:
        add(tar, "a.jpg", b"1")
    with pytest.raises(DamagedTarError, match="is compressed with"):
        scan(path)


def test_what_lies_behind_the_end_is_told(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1")])
    path.write_bytes(path.read_bytes() * 2)
    walk, samples = scan(path, hashed=True)
    assert len(samples) == 1
    assert walk.trailing == path.stat().st_size // 2
