"""Surfaces, volumes and animations: parsed back here by code of their own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from medpsp.deploy import fairing
from medpsp.deploy.fairing import fair
from medpsp.deploy.gif import GifWriter
from medpsp.deploy.marching import march
from medpsp.deploy.mesh import class_boxes, class_surface, volumes_ml, write_meshes
from medpsp.deploy.meshfiles import write_stl
from medpsp.deploy.packed import PackedMask
from medpsp.errors import DicomError, GeometryError
from medpsp.intensity import CLASS_COLOURS

PLAIN = np.eye(4)


def oblique(mirrored: bool) -> Any:
    """Voxels of 0.5 x 0.8 x 3 mm = 1.2 mm³, turned by 30 degrees about two axes, off the origin."""
    c, s = np.cos(np.pi / 6), 0.5
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.5, 0.8, -3 if mirrored else 3])
    affine[:3, 3] = [-120, 80, 700]
    return affine


def read_stl(path: Path) -> Any:
    """Facets: (T, 4, 3), the normal and three corners."""
    data = path.read_bytes()
    (count,) = struct.unpack("<I", data[80:84])
    assert len(data) == 84 + 50 * count
    rows = list(struct.iter_unpack("<12fH", data[84:]))
    assert all(row[12] == 0 for row in rows)
    return np.array([row[:12] for row in rows]).reshape(-1, 4, 3)


def indexed(corners: Any) -> tuple[Any, Any]:
    """(V, 3) and (T, 3) from loose corners."""
    vertices, number = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
    return vertices, number.reshape(-1, 3)


def assert_closed(triangles: Any) -> None:
    """Every edge twice, once each way; around every vertex one fan."""
    a = triangles.ravel().tolist()
    b = np.roll(triangles, -1, axis=1).ravel().tolist()
    c = np.roll(triangles, -2, axis=1).ravel().tolist()
    edges = set(zip(a, b, strict=True))
    assert len(edges) == len(a)
    assert edges == set(zip(b, a, strict=True))
    around: dict[int, dict[int, int]] = {}
    for vertex, start, end in zip(a, b, c, strict=True):
        around.setdefault(vertex, {})[start] = end
    for fan in around.values():
        first = next(iter(fan))
        steps, at = 1, fan[first]
        while at != first:
            steps, at = steps + 1, fan[at]
        assert steps == len(fan)


def volume(corners: Any) -> float:
    """By the divergence theorem."""
    a, b, c = (corners[:, k] - corners[0, 0] for k in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


def grid(size: int) -> Any:
    half = size // 2
    z, y, x = np.ogrid[:size, :size, :size]
    return z - half, y - half, x - half


def bodies() -> dict[str, Any]:
    z, y, x = grid(29)
    far = x * x + y * y + z * z
    around = np.sqrt(x * x + y * y) - 9
    pair = np.zeros((2, 2, 2), dtype=bool)
    pair[0, 0, 0] = pair[0, 1, 1] = True
    corner = np.zeros((2, 2, 2), dtype=bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True
    return {
        "sphere": far <= 100,
        "box": np.ones((5, 6, 7), dtype=bool),
        "ring": around**2 + z * z <= 9,
        "thin ring": (around**2 + z * z) <= 1,
        "two by an edge": pair,
        "two by a corner": corner,
        "cut by the border": (far <= 200)[10:22, 14:, :20],
        "with a cavity": (far <= 150) & (far >= 50),
        "one voxel": np.ones((1, 1, 1), dtype=bool),
        "sheet": np.ones((1, 8, 9), dtype=bool),
        "line": np.ones((9, 1, 1), dtype=bool),
        "noise": np.random.default_rng(0).random((9, 10, 11)) < 0.4,
    }


BODIES = bodies()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("name", list(BODIES))
def test_surface_is_closed_and_encloses_the_volume_of_its_voxels(
    name: str, mirrored: bool, tmp_path: Path
) -> None:
    mask = BODIES[name].astype(np.uint8) * 3
    affine = oblique(mirrored)
    surface = class_surface(mask, 3, affine)
    write_stl(tmp_path / "a.stl", surface)
    facets = read_stl(tmp_path / "a.stl")
    vertices, triangles = indexed(facets[:, 1:])
    assert len(vertices) == len(surface.vertices)  # float32 has not merged any
    assert_closed(triangles)
    expected = int(BODIES[name].sum()) * 1.2  # mm³
    assert volume(facets[:, 1:]) == pytest.approx(expected, rel=1e-3)
    ml = volumes_ml(np.bincount(mask.ravel(), minlength=4), affine)
    assert ml[3] == pytest.approx(expected / 1000)


def test_volumes_in_ml() -> None:
    assert volumes_ml(np.array([10, 5000, 0]), oblique(True)) == pytest.approx((0.012, 6.0, 0.0))
    with pytest.raises(GeometryError, match="not finite, or flat"):
        volumes_ml(np.array([1, 1]), np.diag([1.0, 1, 0, 1]))
    with pytest.raises(GeometryError, match="not finite, or flat"):
        class_surface(np.ones((1, 1, 1), np.uint8), 1, np.full((4, 4), np.nan))


def test_every_kind_of_cell_gives_a_manifold() -> None:
    for kind in range(1, 256):
        corners = np.array([kind >> bit & 1 for bit in range(8)], dtype=bool).reshape(2, 2, 2)
        shell = march(corners.__iter__, 2, 2)
        assert_closed(shell.triangles)
        assert (shell.vertices[:, 0] * shell.sides).sum() == corners.sum()


def test_every_part_keeps_its_own_volume() -> None:
    mask = np.zeros((12, 30, 12), dtype=np.uint8)
    mask[1:11, 1:11, 1:11] = 1
    mask[5, 20, 5] = 1  # 1 of 1001 voxels
    surface = class_surface(mask, 1, PLAIN)
    corners = surface.vertices.astype(np.float64)[surface.triangles]
    small = corners[:, 0, 1] > 15
    assert volume(corners[small]) == pytest.approx(1, rel=1e-3)
    assert volume(corners[~small]) == pytest.approx(1000, rel=1e-3)


def test_sphere_is_smooth_and_its_normals_look_outward(tmp_path: Path) -> None:
    surface = class_surface(BODIES["sphere"].astype(np.uint8), 1, PLAIN)
    write_stl(tmp_path / "a.stl", surface)
    facets = read_stl(tmp_path / "a.stl")
    radial = facets[:, 1:].mean(axis=1) - 14
    radial /= np.linalg.norm(radial, axis=1)[:, None]
    assert np.linalg.norm(facets[:, 0], axis=1) == pytest.approx(1, abs=1e-5)
    cosines = (facets[:, 0] * radial).sum(axis=1)
    assert np.degrees(np.arccos(cosines.clip(-1, 1))).mean() < 6  # 15 and more as voxels
    radius = np.linalg.norm(surface.vertices - np.float32(14), axis=1)
    assert abs(radius - 10).max() < 0.6


def test_stl_lies_where_its_voxels_are(tmp_path: Path) -> None:
    mask = np.zeros((4, 5, 6), dtype=np.uint8)
    mask[1, 2, 4] = 1
    affine = oblique(True)
    files = write_meshes(tmp_path / "case", mask, affine, ("background", "wall"))
    assert [path.name for path in files] == ["case.1-wall.stl", "case.glb"]
    centre = indexed(read_stl(files[0])[:, 1:])[0].mean(axis=0)
    assert centre == pytest.approx(affine[:3] @ [4, 2, 1, 1], abs=1e-4)
    head = files[0].read_bytes()[:80]
    assert b"SPACE=LPS" in head
    assert not head.startswith(b"solid")  # readers would take it for text


def read_glb(path: Path) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    """The JSON, and places, normals and triangles of each mesh."""
    data = path.read_bytes()
    magic, version, length, size, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    tree = json.loads(data[20 : 20 + size])
    at = 20 + size
    count, kind = struct.unpack("<I4s", data[at : at + 8])
    assert at % 4 == 0
    assert kind == b"BIN\0"
    assert count == len(data) - at - 8 == tree["buffers"][0]["byteLength"]
    binary = data[at + 8 :]

    def values(number: int, width: int, letter: str) -> Any:
        accessor = tree["accessors"][number]
        view = tree["bufferViews"][accessor["bufferView"]]
        assert view["byteLength"] == 4 * width * accessor["count"]
        part = binary[view["byteOffset"] :][: view["byteLength"]]
        return np.array(struct.unpack(f"<{len(part) // 4}{letter}", part)).reshape(-1, width)

    meshes = []
    for mesh in tree["meshes"]:
        (one,) = mesh["primitives"]
        at = one["attributes"]
        triangles = values(one["indices"], 1, "I").reshape(-1, 3)
        meshes.append((values(at["POSITION"], 3, "f"), values(at["NORMAL"], 3, "f"), triangles))
        accessor = tree["accessors"][at["POSITION"]]
        assert accessor["min"] == meshes[-1][0].min(axis=0).tolist()
        assert accessor["max"] == meshes[-1][0].max(axis=0).tolist()
    return tree, meshes


def test_glb_has_real_size_and_stands_upright(tmp_path: Path) -> None:
    mask = np.zeros((30, 29, 29), dtype=np.uint8)
    mask[:29][BODIES["sphere"]] = 1
    mask[29, :5, :5] = 9
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    affine[:3, 3] = [10, 20, 30]
    names = ("background", "a", "b", "c", "d", "e", "f", "g", "no. 8", "élan/9")
    files = write_meshes(tmp_path / "case", mask, affine, names)
    assert [path.name for path in files] == ["case.1-a.stl", "case.9-_lan_9.stl", "case.glb"]
    tree, meshes = read_glb(files[-1])
    assert [mesh["name"] for mesh in tree["meshes"]] == ["a", "élan/9"]
    assert [node["mesh"] for node in tree["nodes"]] == tree["scenes"][0]["nodes"] == [0, 1]
    places, normals, triangles = meshes[0]
    assert_closed(triangles)
    expected = BODIES["sphere"].sum() * 20e-9  # m³
    assert volume(places[triangles]) == pytest.approx(expected, rel=1e-3)
    # the centre, 38, 48, 100 mm to the left, back and up; in metres, front is +z
    centre = np.array([0.038, 0.100, -0.048])
    assert places.mean(axis=0) == pytest.approx(centre, abs=1e-4)
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1, abs=1e-5)
    assert ((places - centre) * normals).sum(axis=1).min() > 0
    # class 9 has the colour of class 2 (86, 180, 233), in linear light: ((c + .055) / 1.055) ** 2.4
    colour = tree["materials"][1]["pbrMetallicRoughness"]["baseColorFactor"]
    assert tuple(CLASS_COLOURS[2]) == (86, 180, 233)
    assert colour == pytest.approx([0.0931, 0.4564, 0.8148, 1], abs=1e-4)


def test_same_bytes_twice_and_nothing_else_left(tmp_path: Path) -> None:
    mask = BODIES["noise"].astype(np.uint8)
    once = write_meshes(tmp_path / "a", mask, PLAIN, ("background", "x"))
    again = write_meshes(tmp_path / "b", mask, PLAIN, ("background", "x"))
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_glb_that_cannot_say_its_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = BODIES["sphere"].astype(np.uint8)
    (_, whole) = write_meshes(tmp_path / "a", mask, PLAIN, ("background", "x"))
    monkeypatch.setattr("medpsp.deploy.meshfiles.MOST_GLB", whole.stat().st_size)
    assert len(write_meshes(tmp_path / "b", mask, PLAIN, ("background", "x"))) == 2
    monkeypatch.setattr("medpsp.deploy.meshfiles.MOST_GLB", whole.stat().st_size - 1)
    with pytest.raises(DicomError, match=r"MESH_NOT_WRITTEN: a GLB of \d+ bytes"):
        write_meshes(tmp_path / "c", mask, PLAIN, ("background", "x"))
    assert [path.name for path in tmp_path.glob("*c*")] == ["c.1-x.stl"]  # what predict keeps


def test_background_alone_gives_no_file(tmp_path: Path) -> None:
    mask = np.zeros((3, 4, 5), dtype=np.uint8)
    assert write_meshes(tmp_path / "a", mask, PLAIN, ("background", "x")) == []
    assert list(tmp_path.iterdir()) == []
    assert class_surface(mask, 1, PLAIN).vertices.shape == (0, 3)


def test_memory_of_a_surface_is_below_a_byte_a_voxel() -> None:
    mask = np.zeros((80, 256, 256), dtype=np.uint8)
    z, y, x = grid(61)
    mask[10:71, 90:151, 120:181][x * x + y * y + z * z <= 900] = 1
    class_surface(mask[40:42], 1, PLAIN)
    tracemalloc.start()
    class_surface(mask, 1, PLAIN)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < mask.size  # 5.2 MB; one int64 a voxel would be 42


def speckled(seed: int, shape: tuple[int, int, int] = (24, 40, 40)) -> Any:
    """Many parts, and some that join late: columns that stand on nothing but share a lid."""
    mask = np.random.default_rng(seed).random(shape) < 0.12
    mask[:, ::6, ::6] = True
    mask[-1] = True
    mask[-3:-1, 1:-1, 1:-1] &= mask[:1, 1:-1, 1:-1]
    return mask


def test_blocks_of_triangles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = speckled(0)
    shell = march(mask.__iter__, *mask.shape[1:])
    assert len(shell.triangles) > 3 * fairing.BLOCK
    blocks = fair(shell)
    monkeypatch.setattr(fairing, "BLOCK", 10**9)
    np.testing.assert_allclose(blocks, fair(shell), atol=1e-6)  # voxels


def test_parts_far_from_the_origin_keep_their_volume() -> None:
    mask = np.zeros((1500, 500, 600), dtype=bool)
    for n, size in enumerate((1, 2, 3)):
        mask[1490 : 1490 + size, 480 : 480 + size, 580 + 4 * n : 580 + 4 * n + size] = True
    shell = march(mask.__iter__, *mask.shape[1:])
    places = shell.vertices + np.float64(fair(shell).T)
    part = fairing._parts(len(places), shell.triangles)
    volumes = [
        volume(places[shell.triangles[part[shell.triangles[:, 0]] == number]])
        for number in range(3)
    ]
    assert sorted(volumes) == pytest.approx([1, 8, 27], rel=2e-5)


def test_parts_are_those_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairing, "BLOCK", 100)
    for seed in range(3):
        mask = speckled(seed, (12, 20, 20))
        shell = march(mask.__iter__, *mask.shape[1:])
        count, (a, b, c) = len(shell.vertices), shell.triangles.T
        edges = np.concatenate([a, b]), np.concatenate([b, c])
        graph = coo_matrix((np.ones(len(edges[0])), edges), (count, count))
        expected, labels = connected_components(graph, directed=False)
        part = fairing._parts(count, shell.triangles)
        assert part.max() + 1 == expected > 100
        assert len(np.unique(np.stack([part, labels]), axis=1).T) == expected


def test_ways_to_the_root_of_a_part_stay_short() -> None:
    """A chain of n would take n rounds for each block if the rounds did not halve it."""

    class Counted(np.ndarray):
        rounds = 0

        def __getitem__(self, places: Any) -> Any:
            Counted.rounds += 1
            return np.asarray(self)[places]

    count = 20_000
    root = np.maximum(np.arange(count, dtype=np.int32) - 1, 0).view(Counted)
    found = fairing._top(root, np.arange(count, dtype=np.int32))
    assert not found.any()
    assert Counted.rounds < 100


def test_memory_of_meshes_goes_with_the_largest_surface(tmp_path: Path) -> None:
    mask = PackedMask((40, 80, 80))
    for z, part in enumerate(speckled(1, mask.shape)):
        mask[z] = part.astype(np.uint8) * (1 + z % 2)
    write_meshes(tmp_path / "a", PackedMask((1, 1, 1)), PLAIN, ("background", "x"))
    sizes = [len(class_surface(mask, label, PLAIN).vertices) for label in (1, 2)]
    tracemalloc.start()
    write_meshes(tmp_path / "a", mask, PLAIN, ("background", "x", "y"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert min(sizes) > 50_000
    assert peak < 80 * max(sizes) + 2**21  # bytes of a vertex; blocks of triangles take the rest


def test_packed_masks_read_back() -> None:
    whole = np.random.default_rng(0).integers(0, 200, (4, 5, 7), np.uint8)
    packed = PackedMask(whole.shape)
    for place in (3, 0, 1):
        packed[place] = whole[place]
    whole[2] = 0
    np.testing.assert_array_equal([packed[n] for n in range(4)], whole)
    chosen = packed.chosen([3, 2, 1])
    assert chosen.shape == (3, 5, 7)
    np.testing.assert_array_equal([chosen[n] for n in range(3)], whole[[3, 2, 1]])
    boxes = class_boxes(packed)
    np.testing.assert_array_equal(sorted(boxes), np.unique(whole))
    for label, box in boxes.items():
        inside = np.argwhere(whole == label)
        assert [(s.start, s.stop) for s in box] == [
            (a, b + 1) for a, b in zip(inside.min(0), inside.max(0), strict=True)
        ]


def picture(number: int, size: int = 40) -> Any:
    """Noise on the left, one colour that tells the number on the right."""
    frame = np.random.default_rng(number).integers(0, 256, (size, size + 9, 3), dtype=np.uint8)
    frame[:, size // 2 :] = (number % 256, 200, 7)
    return frame


@pytest.mark.parametrize("count", [1, 2, 7])
def test_gif_reads_back(count: int, tmp_path: Path) -> None:
    with GifWriter(tmp_path / "a.gif") as gif:
        for number in range(count):
            gif.add(picture(number // 2))  # also frames that are equal
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (count, (49, 40), 0)  # type: ignore[attr-defined]
        times = []
        for number in range(count):
            image.seek(number)
            times.append(image.info["duration"])
            shown = np.asarray(image.convert("RGB")).astype(int)
            expected = picture(number // 2).astype(int)
            assert abs(shown - expected)[:, 20:].max() <= 8
            assert abs(shown - expected).mean() < 12
    assert times == [100] * count


def test_grey_frames_keep_every_shade(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    with GifWriter(tmp_path / "a.gif") as gif:
        gif.add(ramp)
    with Image.open(tmp_path / "a.gif") as image:
        assert (np.asarray(image.convert("RGB")) == ramp).all()


def test_gif_of_no_frame_or_of_a_failure_is_not_there(tmp_path: Path) -> None:
    with GifWriter(tmp_path / "a.gif"):
        pass

    def fail() -> None:
        with GifWriter(tmp_path / "b.gif") as gif:
            gif.add(picture(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


GROWTH = """
import sys, pathlib, resource
import numpy as np
from medpsp.deploy.gif import GifWriter
rng = np.random.default_rng(0)
frames = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) // 128 for _ in range(2)]
pages = []
with GifWriter(pathlib.Path(sys.argv[1])) as gif:
    for number in range(300):
        gif.add(frames[number % 2])
        pages.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]))
print((max(pages[10:]) - pages[9]) * resource.getpagesize() // 1024)
"""
"""Not the peak of the process: that may be an import's, or that of whoever started it."""


def test_memory_of_a_gif_is_that_of_a_frame(tmp_path: Path) -> None:
    grown = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "a.gif")],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    assert int(grown) < 2048  # KiB; Pillow's own animation takes 18 MB more
