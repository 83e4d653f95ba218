"""What goes into which shard."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from medpsp.types import Series, SliceRef
from shards.layout import PlannedSeries, ShardPlan, plan_shards


def planned(name: str, slices: int, rows: int = 64, dtype: str = "int16") -> PlannedSeries:
    """A series of patient ``name``; its slices are called name-0, name-1 and so on."""
    refs = tuple(
        SliceRef(
            path=f"/archive/{name}/{i}",
            file_id=f"{name}-{i}",
            patient_id=f"real {name}",
            series_uid=f"1.2.{name}",
            modality="CT",
            rows=rows,
            columns=64,
            dtype=dtype,
            photometric="MONOCHROME2",
        )
        for i in range(slices)
    )
    series = Series(slices=refs, affine=None, z_mm=tuple(float(i) for i in range(slices)))
    return PlannedSeries(
        series=series, patient=name, name=f"s{name}", split="train", order=0.5, stamp="0"
    )


def slots(plans: tuple[ShardPlan, ...]) -> dict[tuple[str, int], str]:
    """(bucket, slot) to the name of the slice that lies there; a slot taken twice is an error."""
    found: dict[tuple[str, int], str] = {}
    for plan in plans:
        for part in plan.parts:
            for number in range(part.start, part.stop):
                place = plan.bucket, part.slot + number - part.start
                assert place not in found
                found[place] = part.planned.series.slices[number].file_id
    return found


def cuts(plan: ShardPlan) -> list[tuple[str, int, int, int]]:
    return [(p.planned.patient, p.start, p.stop, p.slot) for p in plan.parts]


def test_series_lie_end_to_end_and_are_cut_every_shard_slices():
    first, second, third = plan_shards([planned("a", 5), planned("b", 4), planned("c", 2)], 4)
    assert cuts(first) == [("a", 0, 4, 0)]
    assert cuts(second) == [("a", 4, 5, 4), ("b", 0, 3, 5)]
    assert cuts(third) == [("b", 3, 4, 8), ("c", 0, 2, 9)]
    assert [(p.number, p.first, p.count) for p in (first, second, third)] == [
        (0, 0, 4),
        (1, 4, 4),
        (2, 8, 3),
    ]
    assert [p.name for p in (first, second, third)] == [f"64x64_int16-{i}" for i in range(3)]


def test_sizes_and_dtypes_get_buckets_of_their_own_each_from_slot_0():
    plans = plan_shards(
        [planned("a", 2), planned("b", 3, rows=32), planned("c", 1, dtype="float32")], 2
    )
    assert [(p.bucket, p.number, p.first, p.count) for p in plans] == [
        ("32x64_int16", 0, 0, 2),
        ("32x64_int16", 1, 2, 1),
        ("64x64_float32", 0, 0, 1),
        ("64x64_int16", 0, 0, 2),
    ]
    assert [(p.rows, p.columns, p.dtype) for p in plans][1:3] == [
        (32, 64, "int16"),
        (64, 64, "float32"),
    ]


def test_a_series_that_fills_a_shard_leaves_no_empty_one_behind():
    assert [cuts(p) for p in plan_shards([planned("a", 4)], 4)] == [[("a", 0, 4, 0)]]
    assert plan_shards([], 4) == ()


SIZES = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([32, 64]), st.sampled_from(["int16", "float32"])),
    max_size=8,
)


@given(sizes=SIZES, shard_slices=st.integers(1, 7), data=st.data())
def test_every_slice_is_in_exactly_one_slot_whatever_the_order(
    sizes: list[tuple[int, int, str]], shard_slices: int, data: st.DataObject
):
    series = [planned(f"{i:02d}", n, rows, dtype) for i, (n, rows, dtype) in enumerate(sizes)]
    plans = plan_shards(series, shard_slices)
    found = slots(plans)
    assert sorted(found.values()) == sorted(
        f"{i:02d}-{k}" for i, s in enumerate(sizes) for k in range(s[0])
    )
    for bucket in {p.bucket for p in plans}:
        taken = sorted(slot for name, slot in found if name == bucket)
        assert taken == list(range(len(taken)))  # no hole
        counts = [p.count for p in plans if p.bucket == bucket]
        assert all(c == shard_slices for c in counts[:-1])
        assert 1 <= counts[-1] <= shard_slices
    for plan in plans:
        assert plan.first == plan.number * shard_slices == plan.parts[0].slot
    shuffled = data.draw(st.permutations(series))
    assert plan_shards(shuffled, shard_slices) == plans
    assert [p.digest("x") for p in plan_shards(shuffled, shard_slices)] == [
        p.digest("x") for p in plans
    ]


def test_the_digest_changes_with_a_source_a_setting_and_a_slice_of_its_own_series_only():
    a, b = planned("a", 3), planned("b", 3)
    before = [p.digest("settings") for p in plan_shards([a, b], 2)]
    assert len(set(before)) == 3
    other = [p.digest("other") for p in plan_shards([a, b], 2)]
    assert set(other).isdisjoint(before)
    touched = [p.digest("settings") for p in plan_shards([a, replace(b, stamp="1")], 2)]
    # a fills shard 0 and half of shard 1; b the rest
    assert [new == old for new, old in zip(touched, before, strict=True)] == [True, False, False]
    shared = replace(a, series=replace(a.series, mask_partial=True))
    touched = [p.digest("settings") for p in plan_shards([shared, b], 2)]
    assert [new == old for new, old in zip(touched, before, strict=True)] == [False, False, True]
