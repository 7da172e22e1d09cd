"""Windows of pictures, with pyvips and without, and how much memory they take."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillkit.data import large
from distillkit.data.large import open_windows, size_of
from distillkit.data.problems import DataError

READERS = ["pyvips", "Pillow"]


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """Windows are read by one library or the other, however small the picture."""
    if request.param == "pyvips":
        pytest.importorskip("pyvips")
        monkeypatch.setattr(large, "SMALL", 0)
    else:
        monkeypatch.setattr(large, "_pyvips", lambda: None)
    return request.param


def picture(mode: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert("RGB" if mode == "P" else mode).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_windows_are_parts_of_the_picture(tmp_path, reader, mode, ending):
    if ending == "jpg" and mode not in ("RGB", "L"):
        pytest.skip("JPEG has no such pictures")
    if ending == "tif" and mode == "LA":
        pytest.skip("Pillow and libvips read it differently")
    path = tmp_path / f"a.{ending}"
    picture(mode).save(path)
    whole = np.asarray(Image.open(path).convert("RGB"))
    windows = open_windows(path)
    assert type(windows).__name__ == {"pyvips": "_VipsWindows", "Pillow": "_PillowWindows"}[reader]
    assert windows.size == size_of(path) == (60, 80)
    for x, y, width, height in ((0, 0, 80, 60), (10, 5, 30, 20), (79, 59, 1, 1)):
        part = windows.read(x, y, width, height)
        assert part.dtype == np.uint8
        np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])


def test_exif_rotation_is_not_applied(tmp_path, reader):
    upright = picture("RGB")
    exif = upright.getexif()
    exif[0x0112] = 6  # "turn right to show"
    upright.save(tmp_path / "a.jpg", exif=exif)
    assert open_windows(tmp_path / "a.jpg").size == (60, 80)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_that_breaks_off_is_an_error_and_not_grey(tmp_path, reader, ending):
    path = tmp_path / f"a.{ending}"
    picture("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert size_of(path) == (60, 80)
    with pytest.raises(DataError, match=rf"a\.{ending}: the picture cannot be decoded"):
        open_windows(path).read(0, 0, 80, 60)


@pytest.mark.parametrize("function", [open_windows, size_of])
def test_missing_files_and_other_files_are_named(tmp_path, reader, function):
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        function(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png: the picture cannot be decoded \(cannot identify"):
        function(tmp_path / "a.png")


def test_what_pillow_refuses_needs_the_extra(tmp_path, monkeypatch):
    picture("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with monkeypatch.context() as without:
        without.setattr(large, "_pyvips", lambda: None)
        for function in (open_windows, size_of):
            with pytest.raises(DataError, match=r"a\.png: Pillow refuses .* pip install 'distillkit\[dota\]'"):
                function(tmp_path / "a.png")
    pytest.importorskip("pyvips")
    assert size_of(tmp_path / "a.png") == open_windows(tmp_path / "a.png").size == (60, 80)


def test_a_format_that_libvips_does_not_know_is_left_to_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "SMALL", 0)
    picture("RGB").save(tmp_path / "a.bmp")
    assert open_windows(tmp_path / "a.bmp").read(3, 4, 5, 6).shape == (6, 5, 3)


def big_png(path: Path, side: int) -> None:
    """A PNG of side x side whose red and green say column and row modulo 256, written row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    row = np.zeros((side, 3), np.uint8)
    row[:, 0] = np.arange(side) % 256
    packer = zlib.compressobj(1)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])))
        for y in range(side):
            row[:, 1] = y % 256
            file.write(chunk(b"IDAT", packer.compress(b"\0" + row.tobytes())))
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))


PEAK = """
import sys
from pathlib import Path
from distillkit.data.tiling import Tile, Tiling, read_tile
from distillkit.data.large import open_windows
picture = open_windows(sys.argv[1])
assert picture.size == (20000, 20000)
for scale, x, y in ((1, 0, 0), (1, 18976, 18976), (1, 5000, 300), (0.5, 8976, 8976), (0.5, 4000, 8000)):
    part = read_tile(picture, Tile("a", scale, x, y), Tiling())
    if scale == 1:
        assert (part[7, 9] == ((x + 9) % 256, (y + 7) % 256, 0)).all()
# ru_maxrss would begin at what the process that started this one holds
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.integration
def test_a_picture_of_400_million_pixels_stays_under_2_gb(tmp_path):
    pytest.importorskip("pyvips")
    big_png(tmp_path / "a.png", 20000)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2_000_000  # kilobytes
