"""Tiles: where they are cut, what stands on them, and going on after an interruption."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shapely.geometry import Polygon, box

from distillkit.boxes.rotated import corners
from distillkit.data import tile as module
from distillkit.data.check import check_dataset
from distillkit.data.dota import read_dota
from distillkit.data.large import open_windows
from distillkit.data.problems import DataError
from distillkit.data.tile import TileError, tile
from distillkit.data.tiling import Tile, Tiling, read_tile, starts, windows, write_tiles

CLASSES = ["plane", "ship"]
SMALL = Tiling(size=64, overlap=16)


def source(root: Path, sizes: dict[str, tuple[int, int]], objects: int = 15, seed: int = 0) -> Path:
    """Pictures (height, width) whose red says x, green y (in whole pixels, up to 255), with random rectangles."""
    rng = np.random.default_rng(seed)
    for folder in ("images", "labelTxt"):
        (root / "train" / folder).mkdir(parents=True)
    for stem, (height, width) in sizes.items():
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x, y, np.full_like(x, 200)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(root / "train/images" / f"{stem}.png")
        rows = []
        for _ in range(objects):
            drawn = [*rng.uniform([4, 4], [width - 4, height - 4]), *rng.uniform(5, 40, 2), rng.uniform(-4, 4)]
            quad = corners(torch.tensor(drawn, dtype=torch.float64)).flatten().tolist()
            rows.append(" ".join(f"{v:.2f}" for v in quad) + f" {rng.choice(CLASSES)} {rng.integers(0, 3)}\n")
        (root / "train/labelTxt" / f"{stem}.txt").write_text("imagesource:x\ngsd:1\n" + "".join(rows))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".txt")}


def recorded(monkeypatch) -> list[str]:
    """The names of the pictures that are cut from now on."""
    cut: list[str] = []
    monkeypatch.setattr(module, "write_tiles", lambda p, *a, **o: cut.append(p.stem) or write_tiles(p, *a, **o))
    return cut


@pytest.mark.parametrize(
    ("side", "expected"),
    [(1, [0]), (1024, [0]), (1025, [0, 1]), (1848, [0, 824]), (1849, [0, 824, 825]), (3000, [0, 824, 1648, 1976])],
)
def test_the_last_window_is_moved_back_to_the_border(side, expected):
    assert starts(side, 1024, 200) == expected


def test_windows_cover_the_picture_and_share_the_overlap():
    for side in range(1, 400, 7):
        at = starts(side, 64, 16)
        assert at[-1] + 64 == max(side, 64)
        assert all(0 < b - a <= 48 for a, b in pairwise(at))


def test_a_window_that_is_mostly_padding_goes_if_another_is_not():
    """800 x 800 fills 0.15 of a tile at half its size and 0.61 at its own; 700 x 700 fills 0.47 at its own."""
    scales = (0.5, 1.0, 1.5)
    assert {t.scale for t in windows("a", (800, 800), Tiling(scales=scales))} == {1.0, 1.5}
    assert {t.scale for t in windows("a", (700, 700), Tiling(scales=scales))} == {1.5}
    assert {t.scale for t in windows("a", (700, 700), Tiling(scales=(0.5, 1.0)))} == {1.0}
    assert [t.stem for t in windows("a", (100, 90), Tiling())] == ["a__1__0___0"]


@pytest.mark.parametrize("place", [Tile("P0001", 1.0, 0, 824), Tile("a__1__b.c", 0.5, 12, 0), Tile("x y", 1.5, 3, 4)])
def test_names_of_tiles_can_be_read_back(place):
    assert Tile.parse(place.stem) == place


def test_dotas_own_names():
    assert Tile("P0001", 1.0, 824, 1648).stem == "P0001__1__824___1648"
    with pytest.raises(ValueError, match=r"'P0001' is no tile's name"):
        Tile.parse("P0001")


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5), (0.73,)])
def test_tiles_show_what_their_names_say(tmp_path, scales):
    """Oracles: the pixels, which say where they were in the picture; for objects shapely's polygons."""
    tiling = Tiling(size=64, overlap=32, scales=scales)
    root = source(tmp_path / "raw", {"a": (150, 230), "b": (70, 90)})
    tiled = tile(root, "train", tmp_path / "out", CLASSES, tiling)
    raw = {r.path.stem: r for r in read_dota(root, "train", CLASSES).records}
    cut = read_dota(tmp_path / "out", "train", CLASSES)
    assert list(check_dataset(cut)) == []
    assert tiled == (2, len(cut.records), sum(len(r.quads) for r in cut.records))
    whole: dict[tuple[str, float], set[int]] = {}
    for record in cut.records:
        assert record.size == (64, 64)
        place = Tile.parse(record.path.stem)
        pixels = np.asarray(Image.open(record.path)).astype(float)
        inside = pixels[..., 2] == 200
        y, x = np.mgrid[:64, :64] + 0.5
        was_x, was_y = (x + place.x) / place.scale, (y + place.y) / place.scale
        high, wide = raw[place.name].size
        expected = (was_x < wide) & (was_y < high)
        assert (inside != expected).mean() < 0.04  # up to a pixel is lost where the size does not divide
        away = inside & (was_x > 3) & (was_y > 3) & (was_x < wide - 3) & (was_y < high - 3)  # borders are blurred
        assert np.abs(pixels[..., 0] + 0.5 - was_x)[away].max() <= 1
        assert np.abs(pixels[..., 1] + 0.5 - was_y)[away].max() <= 1
        window = box(place.x, place.y, place.x + 64, place.y + 64)
        polygons = [Polygon(q * place.scale) for q in raw[place.name].quads]
        wanted = [i for i, p in enumerate(polygons) if p.intersection(window).area >= 0.7 * p.area]
        back = (record.quads + np.array([place.x, place.y])) / place.scale
        assert len(back) == len(wanted)
        for quad, label, difficult, i in zip(back, record.labels, record.difficult, wanted, strict=True):
            np.testing.assert_allclose(quad, raw[place.name].quads[i], atol=2e-4)  # whole, also where it is cut
            assert (label, difficult) == (raw[place.name].labels[i], raw[place.name].difficult[i])
        held = {i for i in wanted if window.contains(polygons[i])}
        whole[place.name, place.scale] = whole.get((place.name, place.scale), set()) | held
    assert {scale for _, scale in whole} == set(scales)
    fitting = 0
    for (name, scale), found in whole.items():  # what is no larger than the overlap is on some tile as a whole
        high, wide = raw[name].size
        reach = np.ptp(raw[name].quads * scale, axis=1).max(1)
        inside = (raw[name].quads > 1).all((1, 2)) & (raw[name].quads < [wide - 2, high - 2]).all((1, 2))
        small = set(np.flatnonzero(inside & (reach <= tiling.overlap)))
        assert small <= found
        fitting += len(small)
    assert fitting >= 5


def test_padding_has_its_colour_right_and_below(tmp_path):
    root = source(tmp_path / "raw", {"a": (40, 100)})
    tile(root, "train", tmp_path / "out", CLASSES, Tiling(size=64, overlap=16))
    pixels = np.asarray(Image.open(tmp_path / "out/train/images/a__1__36___0.png"))
    assert (pixels[40:] == (124, 116, 104)).all()
    assert (pixels[:40, :, 2] == 200).all()


def test_neighbours_at_another_scale_fit_without_a_seam(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    picture, tiling = open_windows(tmp_path / "a.png"), Tiling(size=64, overlap=16)
    whole = np.asarray(Image.fromarray(noise).resize((100, 75), Image.Resampling.BILINEAR))
    for x, y in ((0, 0), (36, 11), (36, 0), (17, 5)):
        cut = read_tile(picture, Tile("a", 0.5, x, y), tiling)
        np.testing.assert_array_equal(cut, whole[y : y + 64, x : x + 64])


def test_any_number_of_processes_gives_the_same_tiles(tmp_path):
    root = source(tmp_path / "raw", {"a": (150, 230), "b": (70, 90), "c": (64, 64)})
    one, two = [], []
    tile(root, "train", tmp_path / "one", CLASSES, SMALL, progress=lambda *seen: one.append(seen))
    tile(root, "train", tmp_path / "two", CLASSES, SMALL, processes=2, progress=lambda *seen: two.append(seen))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert one == two == [(1, 3), (2, 3), (3, 3)]


def test_going_on_after_an_interruption(tmp_path, monkeypatch):
    root = source(tmp_path / "raw", dict.fromkeys("abcd", (150, 130)))
    whole = tile(root, "train", tmp_path / "whole", CLASSES, SMALL)
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tile(root, "train", out, CLASSES, SMALL, progress=stop)
    (out / "train/images/c__1__0___0.png.part").write_bytes(b"half")  # what a killed process leaves
    (out / "train/images/c__1__9___9.png").write_bytes(b"of an earlier picture c")
    with (out / "train" / module.DONE).open("a") as file:
        file.write('{"source": {"na')
    cut, seen = recorded(monkeypatch), []
    again = tile(root, "train", out, CLASSES, SMALL, progress=lambda *s: seen.append(s))
    assert cut == ["c", "d"]
    assert seen == [(3, 4), (4, 4)]
    assert again == whole
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.rglob("*.part"))
    assert tile(root, "train", out, CLASSES, SMALL) == whole
    assert cut == ["c", "d"]


def test_only_what_changed_is_cut_again(tmp_path, monkeypatch):
    root, out = source(tmp_path / "raw", dict.fromkeys("abcd", (150, 130))), tmp_path / "out"
    tile(root, "train", out, CLASSES, SMALL)
    Image.new("RGB", (64, 64)).save(root / "train/images/a.png")
    (root / "train/labelTxt/b.txt").write_text("10 10 20 10 20 20 10 20 ship 0\n")
    os.utime(root / "train/labelTxt/c.txt")  # touched, not changed
    next((out / "train/images").glob("d__*")).unlink()
    cut = recorded(monkeypatch)
    tile(root, "train", out, CLASSES, SMALL)
    assert cut == ["a", "b", "d"]
    tile(root, "train", tmp_path / "fresh", CLASSES, SMALL)
    assert content(out) == content(tmp_path / "fresh")


def test_a_lost_label_file_is_written_again(tmp_path):
    root = source(tmp_path / "set", {"a": (300, 300)})
    tile(root, "train", tmp_path / "out", CLASSES, Tiling(128, 32))
    before = content(tmp_path / "out")
    next((tmp_path / "out" / "train" / "labelTxt").iterdir()).unlink()
    tile(root, "train", tmp_path / "out", CLASSES, Tiling(128, 32))
    assert content(tmp_path / "out") == before


def test_other_arguments_and_other_pictures_are_errors(tmp_path):
    root, out = source(tmp_path / "raw", {"a": (64, 64), "b": (64, 64)}), tmp_path / "out"
    tile(root, "train", out, CLASSES, SMALL)
    before = content(out)
    with pytest.raises(
        TileError, match=r"another way \(size: 64 there, 96 now; scales: \[1\.0\] there, \[0\.5\] now\)"
    ):
        tile(root, "train", out, CLASSES, Tiling(size=96, overlap=16, scales=(0.5,)))
    with pytest.raises(TileError, match=r"classes: \['plane', 'ship'\] there, \['plane', 'ship', 'car'\] now"):
        tile(root, "train", out, [*CLASSES, "car"], SMALL)
    for path in (root / "train/images/a.png", root / "train/labelTxt/a.txt"):
        path.unlink()
    with pytest.raises(TileError, match=r"tiles of 1 pictures that are not in the split \(a\): use another folder"):
        tile(root, "train", out, CLASSES, SMALL)
    with pytest.raises(TileError, match=r"holds files that are no tiles of ours .* use an empty folder"):
        tile(root, "train", root, CLASSES, SMALL)
    assert content(out) == before


def test_nothing_is_cut_of_a_broken_split(tmp_path):
    root = source(tmp_path / "raw", {"a": (64, 64), "b": (64, 64)})
    (root / "train/labelTxt/b.txt").write_text("1 2 3 ship\n")
    with pytest.raises(DataError, match=r"b\.txt: line 1: 3 coordinates"):
        tile(root, "train", tmp_path / "out", CLASSES, SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_picture_that_breaks_off_is_named_after_the_others_are_cut(tmp_path, processes):
    root = source(tmp_path / "raw", {"a": (64, 64), "b": (300, 300), "c": (64, 64)})
    path = root / "train/images/b.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"b\.png: the picture cannot be decoded"):
        tile(root, "train", tmp_path / "out", CLASSES, SMALL, processes=processes)
    rows = (tmp_path / "out/train" / module.DONE).read_text().splitlines()
    assert sorted(json.loads(row)["source"]["name"] for row in rows) == ["a", "c"]


def test_broken_objects_are_on_no_tile_and_warned_of(tmp_path, caplog):
    root = source(tmp_path / "raw", {"a": (64, 64)}, objects=0)
    (root / "train/labelTxt/a.txt").write_text("1 1 9 9 9 1 1 9 ship 0\n1 1 9 1 9 9 1 9 ship 2\n")
    tile(root, "train", tmp_path / "out", CLASSES, SMALL)
    assert "line 1: quad [1 1 9 9 9 1 1 9] crosses itself" in caplog.text
    label = (tmp_path / "out/train/labelTxt/a__1__0___0.txt").read_text()
    assert label == "1.0 1.0 9.0 1.0 9.0 9.0 1.0 9.0 ship 1\n"


def test_pictures_without_labels(tmp_path):
    root = source(tmp_path / "raw", {"a": (64, 100)})
    for path in (root / "train/labelTxt").iterdir():
        path.unlink()
    (root / "train/labelTxt").rmdir()
    with pytest.raises(DataError, match="labelTxt: no such folder"):
        tile(root, "train", tmp_path / "out", CLASSES, SMALL)
    assert tile(root, "train", tmp_path / "out", CLASSES, SMALL, labelled=False) == (1, 2, 0)
    assert sorted(p.name for p in (tmp_path / "out/train").iterdir()) == ["images", module.DONE, module.MANIFEST]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"overlap": 1024}, "overlap"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 1.0)}, "scales"),
        ({"scales": (0.0,)}, "scales"),
        ({"scales": (1 / 3,)}, "scales"),
        ({"inside": 1.2}, "inside"),
        ({"filled": -1}, "filled"),
    ],
)
def test_impossible_tilings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Tiling(**options)


def test_hit_uav_can_be_tiled(tmp_path):
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with hit_uav")
    root = Path(os.environ["DISTILLKIT_DATA"]) / "hit_uav"
    classes = ["car", "bicycle", "person", "other-vehicle"]
    tiled = tile(root, "val", tmp_path, classes, Tiling(size=256, overlap=64))
    assert (tiled.pictures, tiled.tiles) == (60, 60 * 4)
    assert tiled.objects > 450  # those in the overlaps are on several
    assert read_dota(tmp_path, "val", classes).problems == []
    assert all(re.fullmatch(r".+__1__(0|128)___(0|128)\.png", p.name) for p in (tmp_path / "val/images").iterdir())
    assert math.isclose(sum(len(r.quads) for r in read_dota(tmp_path, "val", classes).records), tiled.objects)


def test_cutting_starts_without_torch():
    """Every process that cuts imports this module."""
    code = "import sys, distillkit.data.tiling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
