"""Label maps on disk: what a score and an index lose, what a picture takes, and what is refused, with its message."""

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from distillkit.data import label_store
from distillkit.data.label_store import (
    JOB,
    MANIFEST,
    AnnotatorInfo,
    LabelInfo,
    LabelMapError,
    LabelStore,
    LabelWriter,
    Preprocessing,
    decode,
    encode,
    skipped,
    weights_sha256,
)
from distillkit.data.picture_list import PictureList, expanded, list_pictures
from distillkit.data.problems import DataError
from distillkit.data.release_maps import ReleaseMaps, read_release_map

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_tl_labelmap_a.npz")
SHA = "ab" * 32


def info(pictures=None, classes=1000, k=5, grid=(7, 7), shard=4, **changes) -> LabelInfo:
    return LabelInfo(
        annotator=AnnotatorInfo(name="resnet18", weights="timm", sha256=SHA, precision="float32"),
        preprocessing=Preprocessing(size=(224, 224), crop=1, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)),
        region="full",
        classes=classes,
        k=k,
        grid=grid,
        shard=shard,
        pictures=len(pictures) if pictures else 1,
        images_sha256=pictures.sha256 if pictures else SHA,
        **changes,
    )


def random_maps(count: int, info: LabelInfo, seed: int = 0, spread: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of random logits of all classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, info.classes, *info.grid, generator=generator) * spread
    return tuple(logits.topk(info.k, 1))


def draw(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6), (number * 20, 0, 0)).save(root / name)
    return root


NAMES = ["cat/a.png", "cat/b.png", "dog/a.png", "dog/c.JPEG", "e.jpg", "f.png"]


@pytest.fixture
def images(tmp_path) -> Path:
    return draw(tmp_path / "images", NAMES)


def written(folder: Path, images: Path, without: tuple[int, ...] = ()) -> dict[str, tuple]:
    """A store of the pictures; what was put in, by key. ``without``: those that could not be read."""
    pictures = list_pictures(images)
    about = info(pictures, grid=(3, 4))
    scores, indices = random_maps(len(pictures), about)
    records = encode(scores, indices, about.record)
    for place in without:
        records[place] = skipped(about.record)[0]
    writer = LabelWriter(folder, about, pictures)
    writer.begin()
    for number in range(about.shards):
        writer.write(number, records[list(about.rows(number))])
    writer.finish()
    return {key: (scores[place], indices[place]) for place, key in enumerate(pictures.keys)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path, images) -> Path:
    written(tmp_path / "maps", images)
    return tmp_path / "maps"


# -- the record


@given(seed=st.integers(0, 10**6), spread=st.floats(1e-6, 1e6), classes=st.sampled_from([5, 300, 1000]))
def test_a_score_loses_half_a_step_and_an_index_nothing(seed, spread, classes):
    about = info(classes=classes)
    scores, indices = random_maps(2, about, seed, spread)
    for record, true, places in zip(encode(scores, indices, about.record), scores, indices):
        read, found = decode(record)
        span = true.max() - true.min()
        assert (read - true).abs().max() <= span / 510 * (1 + 1e-4) + true.abs().max() * 1e-6
        assert torch.equal(found, places)
        assert (read[:-1] >= read[1:]).all()  # the highest first, still
        assert (read.dtype, found.dtype) == (torch.float32, torch.int64)


def test_equal_huge_and_negative_scores():
    about = info(classes=9, k=1, grid=(1, 2))
    scores = torch.tensor([[-3.25, -3.25], [3e38, -3e38], [-1e-8, -7.0], [0.0, 0.0]]).view(4, 1, 1, 2)
    for record, true in zip(encode(scores, torch.zeros(4, 1, 1, 2, dtype=torch.long), about.record), scores):
        torch.testing.assert_close(decode(record)[0], true, rtol=1e-5, atol=1e-7)


def test_bytes_of_a_picture():
    assert info().record.itemsize == 8 + 245 * (1 + 2) == 743
    assert info(classes=21843, grid=(18, 18)).record.itemsize == 8 + 1620 * 3
    assert info(classes=40001).record.itemsize == 8 + 245 * (1 + 4)


@pytest.mark.parametrize(
    ("classes", "index"), [(2050, 2049), (2**15, 2**15 - 1), (2**15 + 1, 2**15), (40001, 40000), (10**6, 10**6 - 1)]
)
def test_indices_that_float16_or_int16_do_not_hold_survive(classes, index):
    record = encode(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), index), info(classes=classes, k=1).record)
    assert decode(record[0])[1].unique().tolist() == [index]


def test_an_index_that_does_not_fit_is_no_other_index():
    with pytest.raises(ValueError, match="class 40000 does not fit into int16"):
        encode(torch.zeros(1, 5, 7, 7), torch.full((1, 5, 7, 7), 40000), info().record)


def test_golden_generator():
    """Logits of the published generator, and what it stored of them in float16."""
    logits = torch.from_numpy(GOLDEN["gen/logits_bhwc"]).permute(0, 3, 1, 2)
    stored = torch.from_numpy(GOLDEN["gen/stored"].astype(np.float32))
    scores, indices = logits.topk(5, 1)
    about = info(classes=12, grid=(4, 4))
    for i, record in enumerate(encode(scores, indices, about.record)):
        read, found = decode(record)
        assert torch.equal(found, stored[i, 1].long())
        span = (scores[i].max() - scores[i].min()).item()
        torch.testing.assert_close(read, stored[i, 0], rtol=0, atol=span / 510 + scores[i].abs().max().item() / 2048)


# -- writing and reading


def test_every_picture_has_its_map(tmp_path, images):
    true = written(tmp_path / "maps", images)
    store = LabelStore(tmp_path / "maps")
    assert store.keys == sorted(NAMES) == list(true)
    assert (len(store), store.classes, store.k, store.grid, store.region) == (6, 1000, 5, (3, 4), "full")
    for key, (scores, indices) in true.items():
        read, found = store[key]
        assert torch.equal(found, indices)
        assert (read - scores).abs().max() <= (scores.max() - scores.min()) / 500
    assert "cat/a.png" in store
    assert "cat/z.png" not in store
    assert sorted(p.name for p in store.folder.iterdir()) == [MANIFEST, "maps-00000.bin", "maps-00001.bin"]
    store.check(images, annotator="resnet18", checksums=True)
    store.check(["e.jpg"], annotator=SHA)


def test_the_shards_can_be_read_by_whoever_reads_the_manifest(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    record = np.dtype(
        [tuple(tuple(part) if isinstance(part, list) else part for part in f) for f in manifest["record"]]
    )
    part = manifest["parts"][1]
    row = np.fromfile(folder / part["file"], record)[part["keys"].index("f.png")]
    scores = row["low"] + row["steps"].astype(float) * (row["high"] - row["low"]) / 255
    np.testing.assert_allclose(scores, LabelStore(folder)["f.png"][0], rtol=1e-5)
    assert part["sha256"] == hashlib.sha256((folder / part["file"]).read_bytes()).hexdigest()


@pytest.fixture
def few_open_files():
    """No more than 64 at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_there_may_be_more_shards_than_open_files(tmp_path, few_open_files):
    pictures = PictureList([tmp_path], [f"{number:02d}.png" for number in range(70)], [1] * 70)
    about = info(pictures, grid=(1, 1), shard=1)
    scores, indices = random_maps(70, about)
    writer = LabelWriter(tmp_path / "maps", about, pictures)
    writer.begin()
    for number, record in enumerate(encode(scores, indices, about.record)):
        writer.write(number, record[None])
    writer.finish()
    store = LabelStore(tmp_path / "maps")
    assert all(torch.equal(store[key][1], places) for key, places in zip(store.keys, indices))
    (tmp_path / "maps/maps-00033.bin").write_bytes(b"half")
    with pytest.raises(LabelMapError, match=r"maps-00033\.bin: ends before picture 0: damaged or exchanged"):
        store["33.png"]


def test_a_loader_process_is_sent_the_path_alone(folder):
    store = LabelStore(folder)
    store["e.jpg"]
    sent = pickle.dumps(store)
    assert len(sent) < 300
    assert torch.equal(pickle.loads(sent)["e.jpg"][0], store["e.jpg"][0])


def test_what_is_read_is_the_readers_own(folder):
    store = LabelStore(folder)
    store["e.jpg"][0].zero_()
    assert store["e.jpg"][0].abs().sum() > 0


def test_weights_are_known_by_names_types_shapes_and_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    first = weights_sha256(model)
    assert weights_sha256(nn.Sequential(*model)) == first
    assert weights_sha256(nn.Sequential(*reversed(model))) != first
    model[1].running_mean[0] += 1e-6
    assert weights_sha256(model) != first
    model.half()
    assert weights_sha256(model) != first


# -- what is refused


def edit(folder: Path, **changes) -> None:
    """Change values of the manifest, by dotted name with __ for the dot."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        inner = content
        for key in above:
            inner = inner[int(key)] if key.isdigit() else inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"manifest\.json: version 2; this distillkit reads up to 1: install a newer one"),
        ({"format": "other"}, r"manifest\.json: not written by distillkit .*name another folder"),
        ({"parts__0__file": "../maps-00000.bin"}, r"manifest\.json: parts\.0\.file: String should match pattern"),
        ({"parts__0__file": "maps-00001.bin"}, r"its shards are not those of 6 pictures; copy it again, or label"),
        ({"parts__0__keys": ["../e.jpg"] * 4}, r"parts\.0\.keys\.0: .*'\.\./e\.jpg' leads out of the folder"),
        ({"parts__0__keys": ["/etc/x.jpg"] * 4}, r"'/etc/x\.jpg' leads out of the folder"),
        ({"parts__0__keys": ["a.png"]}, r"its shards are not those of 6 pictures; copy"),
        ({"parts__0__sizes": [1]}, r"its shards are not those of 6 pictures; copy"),
        ({"parts__0__sha256": "x"}, r"parts\.0\.sha256: String should match"),
        ({"maps__grid": [7, 7]}, r"the record is not that of its k, grid and classes; copy it again"),
        ({"maps__k": 0}, r"maps\.k: Input should be greater than or equal to 1; copy it again"),
        ({"maps__region": "middle"}, r"maps\.region: Input should be 'full' or 'center_square'"),
        ({"more": 1}, r"more: Extra inputs are not permitted"),
    ],
)
def test_wrong_manifests(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(LabelMapError, match=message):
        LabelStore(folder)


def test_damaged_files(folder):
    shard = folder / "maps-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(LabelMapError, match=r"maps-00001\.bin: 375 bytes, expected 376: damaged or exchanged; copy"):
        LabelStore(folder)
    shard.unlink()
    with pytest.raises(LabelMapError, match=r"maps-00001\.bin: no such file, but the manifest names it"):
        LabelStore(folder)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    store = LabelStore(folder)
    store.check()
    with pytest.raises(LabelMapError, match=r"maps-00001\.bin: the checksum is not that of manifest\.json: damaged"):
        store.check(checksums=True)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(LabelMapError, match=r"maps-00001\.bin: the map of e\.jpg is no map of 1000 classes: damaged"):
        LabelStore(folder)["e.jpg"]
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-9])
    with pytest.raises(LabelMapError, match=r"manifest\.json: not JSON .*copy it again"):
        LabelStore(folder)


def test_no_maps_and_unfinished_ones(tmp_path, images):
    with pytest.raises(LabelMapError, match=r"none: no manifest\.json in it: no label maps; make them with"):
        LabelStore(tmp_path / "none")
    pictures = list_pictures(images)
    about = info(pictures)
    writer = LabelWriter(tmp_path / "maps", about, pictures)
    writer.begin()
    writer.write(1, encode(*random_maps(2, about), about.record))
    with pytest.raises(LabelMapError, match=r"maps: unfinished, 1 of 2 shards are there; go on with the same"):
        LabelStore(tmp_path / "maps")
    with pytest.raises(LabelMapError, match=r"maps: 1 of 2 shards are not there \(maps-00000\.bin\); all processes"):
        writer.finish()
    with pytest.raises(ValueError, match=r"shard 0: expected 4 records of 743 bytes, got \(2,\) of 743"):
        writer.write(0, encode(*random_maps(2, about), about.record))


def test_foreign_maps(folder, images):
    store = LabelStore(folder)
    message = r"maps: maps of resnet18 \(weights sha256 abababababab\.\.\.\), expected those of {}: use that"
    with pytest.raises(LabelMapError, match=message.format("resnet50")):
        store.check(annotator="resnet50")
    model = nn.Linear(1, 1)
    with pytest.raises(LabelMapError, match=message.format(weights_sha256(model)[:12] + r"\.\.\.")):
        store.check(annotator=model)
    with pytest.raises(LabelMapError, match=r"2 pictures have no map: no map of x\.jpg, only of such as cat/a\.png"):
        store.check(["e.jpg", "x.jpg", "y.jpg"])
    with pytest.raises(LabelMapError, match=r"no map of e\.png, only of such as"):
        store["e.png"]
    Image.new("RGB", (99, 99)).save(images / "e.jpg")
    with pytest.raises(LabelMapError, match=r"1 pictures in .*images are not as long as they were \(e\.jpg\): maps of"):
        store.check(images)
    (images / "e.jpg").rename(images / "g.jpg")
    with pytest.raises(
        LabelMapError, match=r"1 of its pictures are not in .*images \(e\.jpg\): maps of other pictures"
    ):
        store.check(images)
    shutil.copy(images / "g.jpg", images / "e.jpg")
    with pytest.raises(LabelMapError, match=r"not as long as they were"):
        store.check(images)


def test_pictures_without_a_map_are_named(tmp_path, images):
    written(tmp_path / "maps", images, without=(1, 5))
    store = LabelStore(tmp_path / "maps")
    assert store.skipped == {"cat/b.png", "f.png"}
    assert store.keys == ["cat/a.png", "dog/a.png", "dog/c.JPEG", "e.jpg"]
    assert len(store) == 4
    store.check(store.keys)
    with pytest.raises(LabelMapError, match=r"f\.png could not be read and was skipped; take it out of the training"):
        store["f.png"]
    message = r"2 pictures have no map: cat/b\.png could not be read and was skipped; .*; nor have f\.png"
    with pytest.raises(LabelMapError, match=message):
        store.check(images)


def test_pictures_without_a_map_may_be_taken_away(tmp_path, images):
    maps = tmp_path / "maps"
    written(maps, images, without=(1, 5))
    before = content(maps)
    (images / "cat/b.png").unlink()
    (images / "f.png").unlink()
    pictures = list_pictures(images)
    LabelStore(maps).check(pictures)
    writer = LabelWriter(maps, info(pictures, grid=(3, 4)), pictures)
    assert writer.begin() == []
    writer.finish()
    assert content(maps) == before
    (maps / "maps-00001.bin").unlink()
    message = (
        r"maps-00001\.bin: gone or damaged, and cannot .* that were skipped \(cat/b\.png, f\.png\): put these back"
    )
    with pytest.raises(LabelMapError, match=message):
        writer.begin()
    assert (maps / MANIFEST).is_file()
    draw(images, ["cat/b.png", "f.png"])
    (images / "e.jpg").unlink()
    with pytest.raises(LabelMapError, match=r"1 of its pictures are not in .*images \(e\.jpg\)"):
        LabelWriter(maps, info(pictures), list_pictures(images)).begin()


def test_maps_of_something_else_are_not_gone_on_with(tmp_path, folder, images):
    pictures = list_pictures(images)
    before = content(folder)
    with pytest.raises(LabelMapError, match=r"holds maps that are not these \(k: 5 there, 3 now\): use another folder"):
        LabelWriter(folder, info(pictures, k=3, grid=(3, 4)), pictures).begin()
    draw(images, ["new.png"])
    (images / "f.png").rename(images / "g.png")
    Image.new("RGB", (99, 99)).save(images / "e.jpg")
    pictures = list_pictures(images)
    message = (
        r"\(1 of its pictures are not in .*images \(f\.png\); 1 pictures in .* are not as long as they were "
        r"\(e\.jpg\); 2 pictures in .* are new \(g\.png, new\.png\)\): use another folder"
    )
    with pytest.raises(LabelMapError, match=message):
        LabelWriter(folder, info(pictures, grid=(3, 4)), pictures).begin()
    with pytest.raises(LabelMapError, match=r"images holds files that are no label maps: use an empty folder"):
        LabelWriter(images, info(pictures), pictures).begin()
    assert content(folder) == before


def test_options_of_the_annotator_make_other_maps(folder, images):
    """Manifests from before there were options are of an annotator without any."""
    pictures, mine = list_pictures(images), LabelStore(folder).info
    assert mine.annotator.options == {}
    saved = json.loads((folder / MANIFEST).read_text())
    del saved["maps"]["annotator"]["options"]
    (folder / MANIFEST).write_text(json.dumps(saved))
    assert LabelStore(folder).info == mine
    other = mine.model_copy(update={"annotator": mine.annotator.model_copy(update={"options": {"output_stride": 16}})})
    message = r"\(annotator\.options\.output_stride: not given there, 16 now\)"
    with pytest.raises(LabelMapError, match=message):
        LabelWriter(folder, other, pictures).begin()


def test_a_finished_folder_that_lost_a_shard_is_a_job_again(folder, images):
    pictures = list_pictures(images)
    writer = LabelWriter(folder, LabelStore(folder).info, pictures)
    before = (folder / MANIFEST).read_bytes()
    assert writer.begin() == []
    assert (folder / MANIFEST).read_bytes() == before
    shard = (folder / "maps-00000.bin").read_bytes()
    (folder / "maps-00000.bin").unlink()
    (folder / ".maps-00000.bin.part").write_bytes(b"half")
    assert writer.begin() == [0]
    assert sorted(path.name for path in folder.iterdir()) == [JOB, "maps-00001.bin"]
    writer.write(0, np.frombuffer(shard, writer.info.record))
    writer.finish()
    assert (folder / MANIFEST).read_bytes() == before
    assert not (folder / JOB).exists()


# -- lists of pictures


def pack(path: Path, root: Path, names: list[str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name in names:
            tar.add(root / name, name)
    return path


def test_a_folder_and_tar_files_of_it_are_the_same_pictures(tmp_path, images):
    (images / "cat/notes.txt").write_text("no picture")
    (images / "cat/.hidden.png").write_text("no picture")
    first = pack(tmp_path / "0.tar", images, ["f.png", "dog/c.JPEG", "cat/notes.txt"])
    second = pack(tmp_path / "1.tar", images, ["cat/a.png", "cat/b.png", "cat/.hidden.png", "e.jpg", "dog/a.png"])
    there, packed = list_pictures(images), list_pictures([first, second])
    assert there.keys == packed.keys == sorted(NAMES)
    assert there.sizes == packed.sizes
    assert there.sha256 == packed.sha256 == list_pictures([second, first]).sha256
    assert len(there) == 6
    for index in range(6):
        assert there.read(index).tobytes() == packed.read(index).tobytes()
    assert there.where(5).endswith("images/f.png")
    assert packed.where(5).endswith("0.tar: f.png")
    assert list_pictures(first).keys == ["dog/c.JPEG", "f.png"]
    with tarfile.open(tmp_path / "dot.tar", "w") as tar:
        tar.add(images, ".")
    assert list_pictures(tmp_path / "dot.tar").sha256 == there.sha256


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, images):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/cats").symlink_to(images / "cat")
    (tmp_path / "linked/felines").symlink_to(images / "cat")
    (images / "cat/again").symlink_to(images)
    keys = list_pictures(tmp_path / "linked").keys
    assert [key for key in keys if "again" not in key] == [f"{f}/{n}.png" for f in ("cats", "felines") for n in "ab"]
    assert max(key.count("/") for key in keys) < 5
    (images / "gone.png").symlink_to(images / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png: no file, or a link to none; correct or delete it"):
        list_pictures(images)


def test_names_that_are_no_utf8(tmp_path):
    draw(tmp_path, ["a.png"])
    try:
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this disk has no such names")
    maps = tmp_path.parent / "their maps"
    written(maps, tmp_path)
    assert LabelStore(maps).keys == [os.fsdecode(b"\xff.png")]


def test_wrong_lists_of_pictures(tmp_path, images):
    with pytest.raises(DataError, match=r"none: no such folder; name a folder of pictures, or tar files"):
        list_pictures(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no picture in it \(looked for \.jpg, .*\); correct the path"):
        list_pictures(tmp_path / "empty")
    pack(tmp_path / "empty/0.tar", images, ["e.jpg"])
    with pytest.raises(DataError, match=r"no picture in it .*; name the tar files themselves"):
        list_pictures(tmp_path / "empty")
    for name in ("e.jpg", "dog/a.png"):
        (images / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list_pictures(images)
    lines = [f"{images}: {name}: the file is empty; copy it again or take it out" for name in ("dog/a.png", "e.jpg")]
    assert str(caught.value).splitlines() == lines


def member(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    entry.size = 3 if kind == tarfile.REGTYPE else 0
    tar.addfile(entry, io.BytesIO(b"abc"))


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "a\\evil.jpg", "a//b.jpg"])
def test_members_that_lead_out_of_the_tar_file(tmp_path, name):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member(tar, name)
    with pytest.raises(DataError, match=r"0\.tar: .*evil|b\.jpg.*the name leads out of the folder"):
        list_pictures(tmp_path / "0.tar")


def test_wrong_tar_files(tmp_path, images):
    for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            member(tar, "a.jpg", kind, "/etc/passwd")
        with pytest.raises(DataError, match=rf"{name}\.tar: a\.jpg: the member is a link or no plain file; pack"):
            list_pictures(tmp_path / f"{name}.tar")
    first = pack(tmp_path / "0.tar", images, ["e.jpg", "f.png"])
    second = pack(tmp_path / "1.tar", images, ["f.png"])
    with pytest.raises(DataError, match=r"1\.tar: f\.png: a picture of this name is in .*0\.tar, too; rename one"):
        list_pictures([first, second])
    with pytest.raises(DataError, match=r"e\.jpg: a picture .* in .*0\.tar, too \(and 1 more such names\); name each"):
        list_pictures([first, first])
    packed = pack(tmp_path / "0.tar.gz", images, ["e.jpg"], "w:gz")
    with pytest.raises(DataError, match=r"0\.tar\.gz: not a readable tar file .*tar files that are not compressed"):
        list_pictures(packed)
    first.write_bytes(first.read_bytes()[:700])
    with pytest.raises(DataError, match=r"0\.tar: not a readable tar file \(.*\); .* whole tar files"):
        list_pictures(first)


def test_names_that_come_again_in_every_tar_file_are_one_problem(tmp_path, images):
    tars = [pack(tmp_path / f"{number}.tar", images, NAMES) for number in range(3)]
    with pytest.raises(DataError) as caught:
        list_pictures(tars)
    assert str(caught.value) == (
        f"{tars[1]}: cat/a.png: a picture of this name is in {tars[0]}, too (and 11 more such names); name each tar "
        "file once; where numbers start again in each, count on through all of them, or put the tar file's name in "
        "front, as in 0001/cat/a.png"
    )


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{0008..0010}.tar", ["0008.tar", "0009.tar", "0010.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{0..1}", ["0", "1"]),
        ("{1..00}", ["00", "01"]),
        ("a{1..2}/b-{09..10}", ["a1/b-09", "a1/b-10", "a2/b-09", "a2/b-10"]),
        ("{a..b}-{1,2}", ["{a..b}-{1,2}"]),
    ],
)
def test_names_with_ranges_in_braces(pattern, names):
    assert expanded(pattern) == names


def test_tar_files_named_by_a_range(tmp_path, images):
    for number, name in enumerate(NAMES[:3]):
        pack(tmp_path / f"train-{number:04d}.tar", images, [name])
    there = list_pictures(tmp_path / "train-{0000..0002}.tar")
    assert there.keys == NAMES[:3]
    assert there.where(2) == f"{tmp_path}/train-0002.tar: dog/a.png"
    with pytest.raises(DataError, match=r"train-0003\.tar: not a readable tar file \(.*No such file"):
        list_pictures([str(tmp_path / "train-{0001..0003}.tar")])
    images.rename(tmp_path / "{1..2}")
    assert len(list_pictures(tmp_path / "{1..2}")) == 6


def test_a_picture_that_cannot_be_decoded_is_named(images):
    (images / "e.jpg").write_bytes((images / "e.jpg").read_bytes()[:100])
    pictures = list_pictures(images)
    with pytest.raises(DataError, match=r"images/e\.jpg: the picture cannot be decoded .*; copy the file again, take"):
        pictures.read(pictures.keys.index("e.jpg"))


# -- maps of the published format


def release(root: Path, maps: dict[str, torch.Tensor]) -> Path:
    for name, tensor in maps.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensor, root / f"{name}.pt")
    return root


def test_published_maps_are_read_like_ours(tmp_path):
    stored = torch.from_numpy(GOLDEN["topk"])
    maps = ReleaseMaps(release(tmp_path, {f"n0{i % 2}/p{i}": stored[i] for i in range(4)}), classes=12)
    assert (maps.classes, maps.k, maps.grid, maps.region, len(maps)) == (12, 5, (9, 9), "center_square", 4)
    assert maps.keys == ["n00/p0", "n00/p2", "n01/p1", "n01/p3"]
    for i in range(4):
        scores, indices = maps[f"train/n0{i % 2}/p{i}.first.JPEG"]
        assert torch.equal(scores, stored[i, 0].float())
        assert torch.equal(indices, stored[i, 1].long())
        dense = torch.zeros(12, 9, 9).scatter_(0, indices, scores)
        np.testing.assert_allclose(dense, GOLDEN["dense"][i], rtol=1e-6)
    assert "n00/p0.JPEG" in maps
    assert "n00/p1.JPEG" not in maps
    maps.check(["n00/p0.JPEG", "n01/p1.JPEG"])
    with pytest.raises(LabelMapError, match=r"1 pictures have no map \(n00/p1\.JPEG\)"):
        maps.check(["n00/p0.JPEG", "n00/p1.JPEG"])
    with pytest.raises(LabelMapError, match=r"p0\.pt: the map of n00/p0\.a\.png and of n00/p0\.b\.png, as names end"):
        maps.check(["n00/p0.a.png", "n00/p0.b.png"])
    with pytest.raises(LabelMapError, match=r"p1\.pt: no such file; expected the map of a picture"):
        maps["n00/p1.JPEG"]
    for key in ("../../x/y.JPEG", "p0.JPEG", "/n00/p0.JPEG"):
        with pytest.raises(LabelMapError, match=r"expected the path of a picture, as in n01440764/"):
            maps[key]


def test_published_maps_are_not_listed_one_by_one(tmp_path, monkeypatch):
    maps = {f"n{folder}/{place}": map_of(1) for folder in range(3) for place in range(4)}
    root = release(tmp_path / "maps", maps)
    (root / "a").mkdir()
    opened = ReleaseMaps(root)
    asked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or is_file(path))
    opened.check(f"{name}.JPEG" for name in maps)
    assert asked == []
    with pytest.raises(LabelMapError, match=r"2 pictures have no map \(n1/x\.JPEG, z/x\.JPEG\)"):
        opened.check(["n1/x.JPEG", "n1/0.JPEG", "z/x.JPEG"])
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: listed.append((path, pattern)) or glob(path, pattern))
    ReleaseMaps(root)
    assert listed == [(root, "*"), (root / "a", "*.pt"), (root / "n0", "*.pt")]


def map_of(index: float, score: float = 1.0, shape: tuple[int, ...] = (2, 5, 3, 3)) -> torch.Tensor:
    stored = torch.full(shape, score, dtype=torch.float16)
    stored[1] = index
    return stored


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (map_of(2048), r"class 2048, expected less than 2048: .* float16 does not hold them"),
        (map_of(0.5), "its second half are no class indices"),
        (map_of(-1), "its second half are no class indices"),
        (map_of(3, score=float("nan")), "a score is not finite"),
        (map_of(3, shape=(3, 5, 3, 3)), r"expected a tensor \(2, k, H, W\) .* got \(3, 5, 3, 3\)"),
        ([1, 2], r"expected a tensor \(2, k, H, W\) of scores and class indices, got list"),
    ],
)
def test_wrong_published_maps(tmp_path, stored, message):
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(LabelMapError, match=message):
        read_release_map(tmp_path / "a.pt")


def test_published_maps_that_cannot_be_trusted(tmp_path):
    root = release(tmp_path / "maps", {"n0/a": map_of(7), "n0/b": map_of(7, shape=(2, 5, 4, 4)), "n0/c": map_of(12)})
    with pytest.raises(LabelMapError, match=r"2050 classes, but indices in float16 are wrong above 2048: label the"):
        ReleaseMaps(root, classes=2050)
    maps = ReleaseMaps(root, classes=10)
    with pytest.raises(LabelMapError, match=r"b\.pt: \(5, 4, 4\), other maps here are \(5, 3, 3\)"):
        maps["n0/b.JPEG"]
    with pytest.raises(LabelMapError, match=r"c\.pt: class 12, expected less than 10: the maps are of another number"):
        maps["n0/c.JPEG"]
    (root / "n0/a.pt").write_bytes((root / "n0/a.pt").read_bytes()[:99])
    with pytest.raises(LabelMapError, match=r"a\.pt: not a readable tensor \(.*\): copy it again"):
        ReleaseMaps(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabelMapError, match=r"empty: no <class>/<picture>\.pt in it: name the folder of the class"):
        ReleaseMaps(tmp_path / "empty")


class Touch:
    """What a hostile file names: a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save([map_of(1), Touch(tmp_path / "was here")], tmp_path / "a.pt")
    with pytest.raises(LabelMapError, match=r"a\.pt: not a readable tensor"):
        read_release_map(tmp_path / "a.pt")
    assert not (tmp_path / "was here").exists()
    assert not re.search(r"\b(import pickle|allow_pickle=True)", Path(label_store.__file__).read_text())
