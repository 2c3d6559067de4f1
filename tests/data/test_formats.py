import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pytest

from transformer_vq.config import ConfigError
from transformer_vq.data.formats import HEAD, check, identify, members, read_file, zstd

TEXT = "größer und weiter\n".encode() * 5000
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
PACK[".lzma"] = lambda content: lzma.compress(content, lzma.FORMAT_ALONE)
packings = pytest.mark.parametrize(("suffix", "pack"), list(PACK.items()))


def joined(path):
    return b"".join(piece.text for piece in read_file(path))


def tar_of(contents):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@packings
@pytest.mark.parametrize("named", [True, False])
def test_packed_files_read_as_what_is_in_them(tmp_path, suffix, pack, named):
    path = tmp_path / f"a{suffix if named else '.txt'}"
    path.write_bytes(pack(TEXT))
    assert joined(path) == TEXT
    path.write_bytes(pack(TEXT) + pack(TEXT))  # as `cat` joins them
    assert joined(path) == TEXT * 2
    path.write_bytes(pack(PACK[".gz"](TEXT)))
    assert joined(path) == TEXT


def test_a_skippable_frame_may_come_first(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd.compress(TEXT))
    assert joined(tmp_path / "a.zst") == TEXT


def flip(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


@packings
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no archive", flip])
def test_damaged_files_are_one_line(tmp_path, suffix, pack, damage):
    if suffix == ".zst":
        pack = lambda b: zstd.compress(b, options={zstd.CompressionParameter.checksum_flag: 1})
    noise = np.random.default_rng(0).integers(32, 127, 50_000, dtype=np.uint8).tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(pack(noise)))
    if suffix == ".lzma" and damage is flip:
        assert_named_or_longer(path, noise)
        return
    with pytest.raises(ConfigError, match="not readable") as error:
        joined(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def assert_named_or_longer(path, noise):
    """This format has no checksum: the library may not notice."""
    try:
        assert joined(path) != noise
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], flip])
def test_damaged_archives_are_one_line(tmp_path, kind, damage):
    noise = np.random.default_rng(0).integers(32, 127, 5_000, dtype=np.uint8).tobytes()
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", noise)
    else:  # the second header lies in the middle
        path.write_bytes(tar_of({"a.txt": noise[:2500], "b.txt": noise[:2500]})[: 2 * (512 + 2560)])
        if damage is flip:
            content = path.read_bytes()
            path.write_bytes(content[:3072] + flip(content[3072:3172]) + content[3172:])
    if not (kind == "tar" and damage is flip):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match="not readable") as error:
        joined(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "utf-16-le"])
def test_marked_encodings_are_read_as_utf8(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("e") else ""
    (tmp_path / "a.txt").write_bytes((mark + TEXT.decode()).encode(encoding))
    assert joined(tmp_path / "a.txt") == TEXT
    (tmp_path / "a.txt").write_bytes((mark + TEXT.decode()).encode(encoding)[:-1])
    if encoding == "utf-8-sig":
        assert joined(tmp_path / "a.txt") == TEXT[:-1]
    else:
        with pytest.raises(ConfigError, match=r"a\.txt is not readable: .*truncated"):
            joined(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "content",
    [
        b"plain text",
        "Größe €".encode(),
        "Größe".encode("latin-1") * 100,
        b"int main() { return 0; }\n\0" * 1000,
        b"short\0" * 1000,
        b"\x1b[1mbold\x1b[0m\r\n\f",
        "日本語の文章。".encode("shift_jis") * 100,
        "漢字".encode() * 30_000,
        b'{"a": 1}',
        b"BZh is how bzip2 begins",
        b"",
    ],
)
def test_text_is_text(content):
    assert identify(content[:HEAD]).role == "text"


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(HEAD),
        np.random.default_rng(0).integers(0, 256, 100, dtype=np.uint8).tobytes(),
        np.random.default_rng(0).normal(size=1000).astype(np.float32).tobytes(),
        np.arange(5000, dtype=np.uint16).tobytes(),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x7fELF" + bytes(100),
        b"%PDF-1.7\n text enough to pass for it",
        TEXT.decode().encode("utf-16-le"),
        bytes(1000),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt is no text but ") as error:
        [check(tmp_path / "a.txt", member) for member in members(tmp_path / "a.txt")]
    assert "\n" not in str(error.value)


def test_members_that_are_no_text_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}q\x00.")
    with zipfile.ZipFile(tmp_path / "letter.docx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<xml/>")
    (tmp_path / "nested.tar").write_bytes(tar_of({"in.tar": tar_of({"a.txt": b"a"})}))
    for name, words in {
        "model.pt": r"model\.pt/model/data\.pkl is no text but a pickle",
        "letter.docx": r"letter\.docx is no text but an Office document",
        "nested.tar": r"nested\.tar/in\.tar is tar inside an archive",
    }.items():
        with pytest.raises(ConfigError, match=words):
            [check(tmp_path / name, member) for member in members(tmp_path / name)]
