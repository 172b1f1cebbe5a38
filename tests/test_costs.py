"""Cost formulas against hand counts, profiles, predictions and the measurement of a device."""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_fx import Plan
from monarch_fx import plan as plan_model
from monarch_fx.costs import (
    DeviceProfile,
    Surroundings,
    dense_seconds,
    fit,
    formulas,
    kernel,
    measure,
    measure_device,
    monarch_seconds,
    paying_tokens,
    resolve,
    symbols,
    timing,
)
from monarch_fx.costs.predict import MOST_TOKENS
from monarch_fx.costs.shipped import HOPPER, SHIPPED
from monarch_fx.errors import DeviceProfileError, MonarchWarning
from monarch_fx.kernels import choice
from monarch_fx.structure import MonarchShape

PROFILE = DeviceProfile(
    name="test",
    source="made up",
    peak_flops={"float32": 1e12, "bfloat16": 4e12},
    bandwidth_bytes_per_s=1e11,
    copy_bytes_per_s=5e10,
    launch_s=1e-6,
)


def count(
    expression: sympy.Expr, shape: MonarchShape, tokens: int, batch: int = 1, dtype_bytes: int = 4, splits: int = 1
) -> int:
    """The value of an expression in sizes."""
    grid = (shape.nblocks_out, shape.nblocks_in, shape.rank)
    values = (tokens, shape.in_features, shape.out_features, *grid, batch, dtype_bytes, splits)
    return int(expression.subs(dict(zip(symbols.SIZES, values, strict=True))))


class TestFormulas:
    def test_dense_by_hand(self) -> None:
        shape = MonarchShape(30, 20)
        assert count(formulas.flops(formulas.dense()), shape, tokens=7) == 2 * 7 * 30 * 20
        assert count(formulas.bytes_moved(formulas.dense()), shape, tokens=7) == 4 * (7 * 30 + 30 * 20 + 7 * 20)

    def test_low_rank_is_two_products_and_nothing_else(self) -> None:
        shape = MonarchShape(30, 20, rank=5)
        moved = 2 * (7 * 30 + 30 * 5 + 7 * 5) + 2 * (7 * 5 + 5 * 20 + 7 * 20)
        assert count(formulas.flops(formulas.monarch()), shape, tokens=7) == 2 * 7 * shape.params
        assert count(formulas.bytes_moved(formulas.monarch()), shape, tokens=7, dtype_bytes=2) == 2 * moved // 2

    def test_grid_by_hand(self) -> None:
        shape = MonarchShape(30, 20, nblocks_out=2, nblocks_in=3, rank=5)  # p = 10, s = 10
        first = 3 * (7 * 10 + 10 * 2 * 5 + 7 * 2 * 5)
        middle = 2 * 7 * 2 * 3 * 5
        second = 2 * (7 * 3 * 5 + 3 * 5 * 10 + 7 * 10)
        last = 2 * 7 * 20
        assert count(formulas.flops(formulas.monarch()), shape, tokens=7) == 2 * 7 * shape.params
        assert count(formulas.bytes_moved(formulas.monarch()), shape, tokens=7) == 4 * (first + middle + second + last)

    def test_transposes_that_only_rename_dimensions_are_free(self) -> None:
        def moved(nblocks_out: int, nblocks_in: int, tokens: int) -> tuple[int, int]:
            shape = MonarchShape(32, 32, nblocks_out, nblocks_in, rank=2)
            kernels = [each for each in formulas.monarch() if isinstance(each, kernel.Copy)]
            padding, middle, last = (count(each.bytes_moved, shape, tokens) for each in kernels)
            assert padding == 0
            return middle, last

        assert moved(1, 1, tokens=9) == (0, 0)
        assert moved(4, 1, tokens=9) == (0, 2 * 4 * 9 * 32)
        assert moved(1, 4, tokens=9) == (2 * 4 * 9 * 4 * 2, 0)
        assert moved(4, 4, tokens=1) == (2 * 4 * 16 * 2, 0)

    def test_padding_is_copied_and_computed(self) -> None:
        shape = MonarchShape(10, 7, nblocks_out=2, nblocks_in=3, rank=2)  # p = 4, s = 4
        assert count(formulas.flops(formulas.monarch()), shape, tokens=5) == 2 * 5 * shape.params
        assert count(formulas.monarch()[0].bytes_moved, shape, tokens=5) == 2 * 4 * 5 * 12

    def test_equal_matrices_cost_so_many_times_as_much(self) -> None:
        shape = MonarchShape(32, 16, 2, 2, rank=3)
        for expression in (formulas.flops(formulas.monarch()), formulas.bytes_moved(formulas.dense())):
            assert count(expression, shape, tokens=5, batch=8) == 8 * count(expression, shape, tokens=5)

    @pytest.mark.parametrize("kernels", [formulas.dense, formulas.monarch])
    def test_training_does_every_product_three_times(self, kernels: object) -> None:
        shape = MonarchShape(32, 16, 2, 4, rank=3)
        forward, both = kernels("inference"), kernels("training")  # type: ignore[operator]
        assert count(formulas.flops(both), shape, tokens=5) == 3 * count(formulas.flops(forward), shape, tokens=5)

    def test_training_moves_operands_three_times_and_copies_twice(self) -> None:
        shape = MonarchShape(32, 16, 2, 4, rank=3)
        forward = formulas.monarch("inference")
        products = [each for each in forward if isinstance(each, kernel.Product)]
        copies = [each for each in forward if isinstance(each, kernel.Copy)]
        expected = 3 * count(formulas.bytes_moved(products), shape, 5) + 2 * count(
            formulas.bytes_moved(copies), shape, 5
        )
        assert count(formulas.bytes_moved(formulas.monarch("training")), shape, 5) == expected


class TestSeconds:
    def test_dense_by_hand(self) -> None:
        compute = 2 * 512 * 256 * 128 / 1e12
        traffic = 4 * (512 * 256 + 256 * 128 + 512 * 128) / 1e11
        assert dense_seconds(PROFILE, 512, 256, 128) == pytest.approx(max(compute, traffic) + 1e-6, rel=1e-12)
        both = dataclasses.replace(PROFILE, overlap=0.0)
        assert dense_seconds(both, 512, 256, 128) == pytest.approx(compute + traffic + 1e-6, rel=1e-12)

    def test_monarch_by_hand(self) -> None:
        shape = MonarchShape(256, 128, 2, 2, rank=16)
        first = max(2 * 2 * 512 * 128 * 32 / 1e12, 4 * 2 * (512 * 128 + 128 * 32 + 512 * 32) / 1e11)
        second = max(2 * 2 * 512 * 32 * 64 / 1e12, 4 * 2 * (512 * 32 + 32 * 64 + 512 * 64) / 1e11)
        copies = 2 * 4 * 512 * (4 * 16 + 128) / 5e10
        expected = first + second + copies + 4e-6
        assert monarch_seconds(PROFILE, 512, shape) == pytest.approx(expected, rel=1e-12)

    def test_tiles_of_many_rows_fill_whole_waves(self) -> None:
        gpu = dataclasses.replace(PROFILE, bandwidth_bytes_per_s=1e15, launch_s=0.0, tile=64, units=10, fill=100)
        wave = 10 * 2 * 64 * 64 * (1000 + 100) / 1e12
        of_few_rows = ((1, 1.0), (64 * 10, 1.0), (64 * 15, 1.5), (2048, 3.2))
        for tokens, waves in (*of_few_rows, (2049, 4.0), (64 * 50, 5.0), (64 * 50 + 1, 6.0)):
            assert dense_seconds(gpu, tokens, 1000, 64) == pytest.approx(waves * wave, rel=1e-12)

    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize("workload", ["inference", "training"])
    def test_monotone_in_tokens(self, name: str, workload: str) -> None:
        tokens = np.arange(1, 3000)
        shape = MonarchShape(768, 3072, 4, 4, rank=64)
        dense = dense_seconds(SHIPPED[name], tokens, 768, 3072, workload=workload)
        monarch = monarch_seconds(SHIPPED[name], tokens, shape, workload=workload)
        for times in (dense, monarch):
            assert np.all(np.diff(times) >= -1e-12 * times[1:])  # rounding of sums

    @settings(max_examples=50, deadline=None)
    @given(
        tokens=st.integers(1, 10_000),
        sizes=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
        grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        batch=st.integers(1, 8),
        name=st.sampled_from(list(SHIPPED)),
    )
    def test_never_below_what_the_device_can_do(
        self, tokens: int, sizes: tuple[int, int], grid: tuple[int, int], batch: int, name: str
    ) -> None:
        profile = SHIPPED[name]
        shape = MonarchShape(*sizes, min(grid[0], sizes[1]), min(grid[1], sizes[0]), rank=16)
        seconds = monarch_seconds(profile, tokens, shape, batch=batch, dtype="bfloat16")
        work = 2 * tokens * batch * shape.params / profile.peak("bfloat16")
        weights = 2 * batch * shape.params / profile.bandwidth_bytes_per_s
        assert seconds >= max(work, weights) * (1 - 1e-9)

    def test_arrays_give_arrays(self) -> None:
        shape = MonarchShape(64, 64, 2, 2, rank=8)
        tokens = np.array([1, 10, 100])
        times = monarch_seconds(PROFILE, tokens, shape)
        assert times.tolist() == [monarch_seconds(PROFILE, int(t), shape) for t in tokens]

    def test_unknown_dtype_is_named(self) -> None:
        with pytest.raises(DeviceProfileError, match=r"'test'.*'complex64'.*float32, bfloat16"):
            dense_seconds(PROFILE, 1, 8, 8, dtype="complex64")

    @pytest.mark.parametrize(
        ("profile", "tokens", "shape", "faster"),
        [
            ("cpu", 1024, MonarchShape(768, 768, 1, 1, 192), True),
            ("cpu", 1024, MonarchShape(768, 3072, 4, 4, 64), True),
            ("cpu", 16, MonarchShape(64, 64, 4, 4, 8), False),  # launches
            ("h100", 1, MonarchShape(768, 3072, 1, 1, 304), True),
            ("h100", 4, MonarchShape(768, 3072, 1, 1, 304), False),
            ("h100", 4096, MonarchShape(768, 768, 4, 4, 48), False),
            ("h100", 16384, MonarchShape(1024, 1024, 1, 1, 256), True),
            ("h100", 8192, MonarchShape(4096, 4096, 4, 4, 256), True),
            ("h100", 8192, MonarchShape(4096, 14336, 4, 4, 256), True),
        ],
        ids=str,
    )
    def test_verdicts_are_those_that_were_measured(
        self, profile: str, tokens: int, shape: MonarchShape, faster: bool
    ) -> None:
        dtype = "float32" if profile == "cpu" else "bfloat16"
        monarch = monarch_seconds(SHIPPED[profile], tokens, shape, dtype=dtype)
        dense = dense_seconds(SHIPPED[profile], tokens, shape.in_features, shape.out_features, dtype=dtype)
        assert bool(monarch < dense) == faster

    @pytest.mark.parametrize(
        ("tokens", "sizes", "microseconds"),
        [(8192, (768, 768), 17), (8192, (1024, 1024), 27.5), (8192, (4096, 4096), 372), (1, (4096, 14336), 41.5)],
    )
    def test_h100_predicts_what_was_measured(self, tokens: int, sizes: tuple[int, int], microseconds: float) -> None:
        predicted = dense_seconds(SHIPPED["h100"], tokens, *sizes, dtype="bfloat16")
        assert predicted * 1e6 == pytest.approx(microseconds, rel=0.2)


class TestPayingTokens:
    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize("shape", [MonarchShape(768, 768, 1, 1, 192), MonarchShape(1024, 4096, 2, 2, 128)], ids=str)
    def test_ranges_are_where_the_product_is_faster(self, name: str, shape: MonarchShape) -> None:
        profile, tokens = SHIPPED[name], np.arange(1, MOST_TOKENS + 1)
        dense = dense_seconds(profile, tokens, shape.in_features, shape.out_features, dtype="bfloat16")
        faster = np.asarray(dense > monarch_seconds(profile, tokens, shape, dtype="bfloat16"))
        listed = np.zeros_like(faster)
        ranges = paying_tokens(profile, shape, dtype="bfloat16")
        for first, last in ranges:
            listed[first - 1 : last] = True
        assert np.array_equal(listed, faster)
        assert all(last is not None and last + 1 < first for (_, last), (first, _) in itertools.pairwise(ranges))

    def test_low_rank_pays_everywhere_at_some_number(self) -> None:
        for profile in SHIPPED.values():
            assert paying_tokens(profile, MonarchShape(768, 768, 1, 1, 192), dtype="bfloat16")[-1][1] is None

    def test_more_parameters_than_dense_never_pay(self) -> None:
        assert paying_tokens(SHIPPED["cpu"], MonarchShape(64, 64, 2, 2, 32)) == ()


class TestProfile:
    @pytest.mark.parametrize("profile", SHIPPED.values(), ids=lambda profile: profile.name)
    def test_shipped_ones_survive_json_and_know_the_usual_dtypes(self, profile: DeviceProfile) -> None:
        assert DeviceProfile.from_json(profile.to_json()) == profile
        assert profile.source
        assert {"float32", "bfloat16", "float16", "float64"} <= set(profile.peak_flops)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bandwidth_bytes_per_s": 0}, "bandwidth_bytes_per_s must be a positive finite number, got 0"),
            ({"launch_s": -1.0}, r"launch_s must be a non-negative finite number, got -1\.0"),
            ({"launch_s": math.nan}, "got nan"),
            ({"tile": 0}, "tile must be a positive"),
            ({"overlap": 1.5}, r"overlap must be in \[0, 1\], got 1\.5"),
            ({"peak_flops": {}}, "peak_flops must map dtypes"),
            ({"peak_flops": {"float32": math.inf}}, r"peak_flops\['float32'\] must be a positive finite number"),
            ({"peak_flops": {"fp8": 1.0}}, "unknown dtype 'fp8'"),
            ({"kernel_efficiency": 0.5}, "kernel_operand_bytes_per_s must be a positive finite number, got 0"),
            ({"name": ""}, "name must be a text"),
        ],
    )
    def test_bad_numbers_are_named(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(DeviceProfileError, match=message):
            dataclasses.replace(PROFILE, **change)  # type: ignore[arg-type]

    @pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name": 1'])
    def test_other_texts_are_refused(self, text: str) -> None:
        with pytest.raises(DeviceProfileError, match="not a profile"):
            DeviceProfile.from_json(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    monkeypatch.setattr(measure.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path / "monarch_fx"


class TestResolve:
    def test_by_name_and_as_a_profile(self) -> None:
        assert resolve("h100", "cpu") is SHIPPED["h100"]
        assert resolve(PROFILE, "cpu") is PROFILE

    def test_unknown_names_are_answered_with_the_known_ones(self) -> None:
        with pytest.raises(DeviceProfileError, match=r"Unknown device profile 'h1000'.*'cpu', 'a100', 'h100', 'h200'"):
            resolve("h1000", "cpu")

    def test_auto_on_a_cpu(self, cache: Path) -> None:
        assert resolve("auto", torch.device("cpu")) is SHIPPED["cpu"]

    @pytest.mark.parametrize(
        ("gpu", "name"),
        [
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ],
    )
    def test_auto_on_a_gpu(self, gpu: str, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
        assert resolve("auto", "cuda").name == name

    def test_unknown_gpus_are_to_be_measured(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Voodoo 2")
        with pytest.raises(DeviceProfileError, match=r"'Voodoo 2': run measure_device\('cuda'\) once"):
            resolve("auto", "cuda")
        with pytest.raises(DeviceProfileError, match=r"fits the device 'mps': pass the closest of"):
            resolve("auto", "mps")


class TestLoweringsOfAGpu:
    """Where this library's kernels run, no product is copied."""

    shape = MonarchShape(4096, 14336, 2, 2, 784)

    @pytest.mark.parametrize("first", ["strided", "own"])
    @pytest.mark.parametrize("second", ["library", "own"])
    def test_the_same_work_without_copies(self, first: str, second: str) -> None:
        kernels = formulas.first_half(first) + formulas.second_half(second)
        assert not any(isinstance(each, kernel.Copy) for each in kernels)
        assert count(formulas.flops(kernels), self.shape, tokens=7) == 2 * 7 * self.shape.params

    @pytest.mark.parametrize(
        ("operand_bytes_per_s", "waves", "step_s"),
        [
            (1e18, 8, 2 * 16 * 64 / 2e12),  # of 16 x 64, whose pipeline is full soonest
            (1e9, 1, 2 * (128 + 64) / 1e9),  # of 128 x 64: two of 64 x 64 take in a third more, and so does 128 x 128
        ],
    )
    def test_own_kernels_take_the_fastest_of_their_tiles(
        self, operand_bytes_per_s: float, waves: int, step_s: float
    ) -> None:
        gpu = dataclasses.replace(PROFILE, tile=64, units=10, bandwidth_bytes_per_s=1e18)
        # a first half of 2 x (128, 1024) @ (1024, 320), and an unaligned second one, which is a library's
        shape = MonarchShape(2048, 2056, 2, 2, rank=160)
        taken, nothing = (
            monarch_seconds(
                dataclasses.replace(gpu, kernel_efficiency=efficiency, kernel_operand_bytes_per_s=rate),
                128,
                shape,
                dtype="bfloat16",
            )
            for efficiency, rate in ((0.5, operand_bytes_per_s), (1e9, 1e30))
        )
        steps = waves * 1024 + kernel.OWN_FILL
        assert taken - nothing == pytest.approx(10 * steps * step_s, rel=1e-6)

    @pytest.mark.parametrize(
        ("grid", "rank", "launches"),
        [
            ((8, 2), 128, 0),  # both halves are ours
            ((1, 4), 256, 1.58),  # a library's, the first one a batched product
            ((4, 1), 256, 2),  # the second one is ours, behind a library's
        ],
        ids=str,
    )
    def test_second_halves_start_early_behind_our_own_first_ones(
        self, grid: tuple[int, int], rank: int, launches: float
    ) -> None:
        h100, shape = SHIPPED["h100"], MonarchShape(4096, 4096, *grid, rank)
        assert choice.is_own_second(1024, shape.s, shape.nblocks_in * rank, grid[0], h100.units) == (grid != (1, 4))
        slower = dataclasses.replace(h100, launch_s=h100.launch_s + 1e-6)
        one, other = (monarch_seconds(each, 1024, shape, dtype="bfloat16") for each in (h100, slower))
        assert other - one == pytest.approx(launches * 1e-6, abs=1e-12)

    def test_sums_in_parts_by_hand(self) -> None:
        shape = MonarchShape(30, 20, 2, 3, rank=5)  # p = 10
        sums, total = formulas.first_half("own")
        for splits in (1, 4):
            assert count(sums.flops + total.flops, shape, tokens=7, splits=splits) == 2 * 7 * 3 * 10 * 2 * 5
        assert count(total.bytes_moved, shape, tokens=7, dtype_bytes=2, splits=4) == (4 * 4 + 2) * 3 * 7 * 2 * 5
        assert count(total.bytes_moved, shape, tokens=7, dtype_bytes=2, splits=1) == 0
        assert total.seconds.subs(symbols.splits, 1) == 0

    def test_long_sums_of_few_tokens_cost_less_in_parts(self) -> None:
        """Columns as few as that leave most units idle."""
        h200, shape = SHIPPED["h200"], MonarchShape(14336, 4096, 1, 1, 784)
        for tokens, tile in ((4, choice.SKINNY), (64, choice.PLAIN_NARROW)):
            width, p, units = shape.rank, shape.p, h200.units
            assert choice.first_tile(tokens, width, 1, p, units, described=False) == tile
            assert choice.splits(tile, tokens, width, 1, p, units) > 1
            in_parts = monarch_seconds(h200, tokens, shape, dtype="bfloat16")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(choice, "splits", lambda *sizes: 1)
                assert in_parts < 0.7 * monarch_seconds(h200, tokens, shape, dtype="bfloat16")

    @pytest.mark.parametrize("tokens", [4, 256])
    def test_low_rank_is_trained_as_a_library_s_products(self, tokens: int) -> None:
        """Short second halves, and sums that would be cut, in inference and where the intermediate is computed anew."""
        gpu = dataclasses.replace(SHIPPED["h200"], kernel_launch_s=1.0)
        shape = MonarchShape(4096, 1024, 1, 1, 128)
        options = {"dtype": "bfloat16", "workload": "training"}
        assert monarch_seconds(gpu, tokens, shape, dtype="bfloat16") > 1
        assert monarch_seconds(gpu, tokens, shape, **options) < 1
        assert monarch_seconds(gpu, tokens, shape, **options, around=Surroundings(recomputed=True)) > 1

    def test_second_halves_are_a_library_s_where_kernels_can_t_start_early(self) -> None:
        shape = MonarchShape(1024, 1024, 2, 2, 64)
        for profile, launches in ((SHIPPED["h200"], 2), (SHIPPED["a100"], 1)):
            slow = dataclasses.replace(profile, kernel_launch_s=1.0)
            assert monarch_seconds(slow, 256, shape, dtype="bfloat16") == pytest.approx(launches, rel=1e-3)

    def test_gradients_of_factors_by_hand(self) -> None:
        shape = MonarchShape(30, 20, 2, 3, rank=5)  # p = 10, s = 10
        kernels = formulas.factor_gradients()
        moved = 3 * (7 * (10 + 10) + 10 * 10) + 2 * (7 * (15 + 10) + 15 * 10)
        assert count(formulas.flops(kernels), shape, tokens=7) == 2 * 7 * shape.params
        assert count(formulas.bytes_moved(kernels), shape, tokens=7, dtype_bytes=2) == 2 * moved

    def test_they_are_planned_for_half_precision_grids_alone(self) -> None:
        h200 = SHIPPED["h200"]
        plain = dataclasses.replace(h200, kernel_efficiency=0.0)
        for tokens in (200, 4096):
            ours = monarch_seconds(h200, tokens, self.shape, dtype="bfloat16")
            assert ours < monarch_seconds(plain, tokens, self.shape, dtype="bfloat16")
        for shape, tokens, options in (
            (self.shape, 64, {"dtype": "float32"}),
            (self.shape, 64, {"dtype": "bfloat16", "batch": 8}),
        ):
            assert monarch_seconds(h200, tokens, shape, **options) == monarch_seconds(plain, tokens, shape, **options)
        low_rank = MonarchShape(4096, 14336, 1, 1, 1584)
        without, times = (monarch_seconds(profile, 4096, low_rank, dtype="bfloat16") for profile in (plain, h200))
        saved = 2 * 0.13 * h200.launch_s  # two launches of a library with many tokens
        assert times == pytest.approx(without - saved, rel=1e-6)

    def test_a_recomputed_intermediate_costs_one_more_first_half(self) -> None:
        """Six halves' work become seven where s is p; less where one kernel runs the forward pass."""
        options = {"dtype": "bfloat16", "workload": "training"}
        for shape, tokens, profile in (
            (MonarchShape(8192, 8192, 2, 2, 1024), 16384, SHIPPED["h100"]),
            (MonarchShape(4096, 4096, 4, 4, 256), 256, SHIPPED["cpu"]),
        ):
            kept, again = (
                monarch_seconds(profile, tokens, shape, around=Surroundings(recomputed=recomputed), **options)
                for recomputed in (False, True)
            )
            assert again / kept == pytest.approx(7 / 6, abs=0.05)
        inference = {"dtype": "bfloat16", "around": Surroundings(recomputed=True)}
        shape = MonarchShape(1024, 1024, 2, 2, 128)
        assert monarch_seconds(SHIPPED["h100"], 8192, shape, **inference) == monarch_seconds(
            SHIPPED["h100"], 8192, shape, dtype="bfloat16"
        )
        slow = dataclasses.replace(SHIPPED["h100"], fused_efficiency=0.0)
        options["around"] = Surroundings(recomputed=True)
        assert monarch_seconds(SHIPPED["h100"], 8192, shape, **options) < monarch_seconds(slow, 8192, shape, **options)

    def test_small_products_are_one_kernel_in_inference(self) -> None:
        shape = MonarchShape(1024, 1024, 2, 2, 128)
        slow = dataclasses.replace(SHIPPED["h100"], fused_efficiency=1e-3)
        for tokens, workload, is_fused in (
            (8192, "inference", True),
            (4224, "inference", True),  # 2 x 66 programs, and 132 units
            (4160, "inference", False),
            (8192, "training", False),
        ):
            options = {"dtype": "bfloat16", "workload": workload}
            ours, theirs = (monarch_seconds(profile, tokens, shape, **options) for profile in (SHIPPED["h100"], slow))
            assert (ours < theirs) == is_fused
        kernels = formulas.fused(128, 64)
        assert count(formulas.flops(kernels), shape, tokens=7) == 2 * 7 * shape.params
        assert count(formulas.bytes_moved(kernels), shape, tokens=7, dtype_bytes=2) == 2 * (7 * 2048 + shape.params)

    def test_few_activations_come_from_a_cache_and_weights_do_not(self) -> None:
        memory = dataclasses.replace(PROFILE, launch_s=0.0, peak_flops={"float32": 1e30}, bandwidth_bytes_per_s=1.0)
        cached = dataclasses.replace(memory, cache_bytes=4 * 10 * (30 + 50))  # ten rows of float32, read and written
        for tokens, share in ((10, kernel.CACHED), (11, 1.0)):
            expected = 4 * (share * tokens * (30 + 50) + 30 * 50)
            assert float(dense_seconds(cached, tokens, 30, 50)) == pytest.approx(expected)
            assert float(dense_seconds(memory, tokens, 30, 50)) == pytest.approx(4 * (tokens * (30 + 50) + 30 * 50))

    @pytest.mark.parametrize("grid", [(2, 2), (4, 1)])
    def test_an_array_of_tokens_gives_each_its_own_lowering(self, grid: tuple[int, int]) -> None:
        shape = MonarchShape(4096, 4096, *grid, 256)
        tokens = np.array([1, 64, 65, 1024, 16384])
        together = monarch_seconds(SHIPPED["h200"], tokens, shape, dtype="bfloat16")
        alone = [monarch_seconds(SHIPPED["h200"], int(t), shape, dtype="bfloat16") for t in tokens]
        np.testing.assert_allclose(together, alone, rtol=1e-12)


class TestSurroundings:
    """What a bias, an activation and other products of the same rows cost where this library's kernels run."""

    h100 = SHIPPED["h100"]
    widening = MonarchShape(1024, 4096, 2, 1, 336)

    def gain(self, around: Surroundings, tokens: int = 16384, dtype: str = "bfloat16", **options: str) -> float:
        shape = self.widening
        dense = dense_seconds(self.h100, tokens, 1024, 4096, dtype=dtype, around=around, **options)
        return float(dense / monarch_seconds(self.h100, tokens, shape, dtype=dtype, around=around, **options))

    def test_a_bias_makes_the_second_half_a_kernel_of_ours(self) -> None:
        slow = dataclasses.replace(self.h100, kernel_efficiency=0.1)

        def slower(
            grid: tuple[int, int], bias: bool, workload: str = "inference", tokens: int = 4096, rank: int = 256
        ) -> bool:
            shape, around = MonarchShape(4096, 4096, *grid, rank), Surroundings(bias=bias)
            options = {"dtype": "bfloat16", "around": around, "workload": workload}
            return bool(
                monarch_seconds(slow, tokens, shape, **options) > monarch_seconds(self.h100, tokens, shape, **options)
            )

        assert not slower((2, 1), bias=False)
        assert slower((2, 1), bias=True)
        assert not slower((1, 1), bias=True)  # one product of cuBLAS, which adds it
        assert slower((2, 2), bias=False)
        assert not slower((1, 2), bias=False)  # a single row of blocks: nothing to transpose
        assert slower((1, 2), bias=False, tokens=256)
        assert not slower((2, 2), bias=False, rank=336)  # two rows, and tiles that don't fit
        assert slower((2, 2), bias=False, rank=336, tokens=2048)
        assert not slower((2, 1), bias=False, workload="training")  # the transposed matrix has one, too

    def test_an_activation_is_a_pass_behind_the_dense_product_alone(self) -> None:
        extra = dense_seconds(self.h100, 16384, 1024, 4096, dtype="bfloat16", around=Surroundings(activated=True))
        extra -= dense_seconds(self.h100, 16384, 1024, 4096, dtype="bfloat16")
        traffic = 2 * 2 * 16384 * 4096 / self.h100.bandwidth_bytes_per_s
        compute = kernel.ACTIVATION_FLOPS * 16384 * 4096 / self.h100.peak_flops["float32"]
        hidden = self.h100.kernel_overlap * min(traffic, compute)
        assert extra == pytest.approx(self.h100.kernel_launch_s + traffic + compute - hidden, rel=1e-9)
        assert self.gain(Surroundings(bias=True, activated=True)) > self.gain(Surroundings(bias=True))

    @pytest.mark.parametrize("options", [{"workload": "training"}, {"dtype": "float32"}], ids=str)
    def test_it_is_a_pass_on_both_sides_elsewhere(self, options: dict[str, str]) -> None:
        assert self.gain(Surroundings(activated=True), **options) == self.gain(Surroundings(), **options)

    @pytest.mark.parametrize(
        ("tokens", "sizes", "grid", "rank", "dense_us", "ours_us"),
        [
            (16384, (768, 3072), (1, 1), 192, 192.1, 97.4),
            (16384, (768, 3072), (2, 2), 96, 192.1, 101.8),
            (8192, (1024, 4096), (2, 2), 128, 149.8, 83.3),
            (16384, (1024, 4096), (1, 1), 256, 285.4, 141.3),
        ],
    )
    def test_bias_and_gelu_are_predicted_as_measured(
        self, tokens: int, sizes: tuple[int, int], grid: tuple[int, int], rank: int, dense_us: float, ours_us: float
    ) -> None:
        """Compiled layers on an H100 (benchmark ``ffn-gpu``), in no fit."""
        around, shape = Surroundings(bias=True, activated=True), MonarchShape(*sizes, *grid, rank)
        dense = dense_seconds(self.h100, tokens, *sizes, dtype="bfloat16", around=around)
        ours = monarch_seconds(self.h100, tokens, shape, dtype="bfloat16", around=around)
        assert dense * 1e6 == pytest.approx(dense_us, rel=0.2)
        assert ours * 1e6 == pytest.approx(ours_us, rel=0.2)

    def test_few_tokens_share_launches(self) -> None:
        shape = MonarchShape(4096, 4096, 4, 4, 256)

        def saved(tokens: int, together: int, workload: str = "inference") -> float:
            options = {"dtype": "bfloat16", "workload": workload}
            alone = monarch_seconds(self.h100, tokens, shape, **options)
            return float(
                alone - monarch_seconds(self.h100, tokens, shape, around=Surroundings(together=together), **options)
            )

        for together, shared in ((1, 0), (2, 1), (3, 4 / 3), (8, 4 / 3)):  # of a product's two launches
            assert saved(40, together) == pytest.approx(shared * self.h100.kernel_launch_s, rel=1e-6)
        assert saved(65, together=3) == 0
        assert saved(1, together=3, workload="training") == 0

    # benchmarks/results/layers-gpu, bfloat16; the fourth one's factors don't fit in registers
    @pytest.mark.parametrize(
        ("shape", "microseconds"),
        [
            (MonarchShape(1024, 4096, 2, 2, 192), 4.4),
            (MonarchShape(4096, 4096, 4, 4, 256), 8.9),
            (MonarchShape(8192, 8192, 8, 2, 256), 18.8),
            (MonarchShape(4096, 14336, 4, 4, 384), 23.2),
        ],
        ids=str,
    )
    def test_one_token_whose_factors_registers_hold(self, shape: MonarchShape, microseconds: float) -> None:
        one = monarch_seconds(self.h100, 1, shape, dtype="bfloat16") * 1e6
        assert one == pytest.approx(microseconds, rel=0.1)
        in_tiles = dataclasses.replace(self.h100, kernel_overlap=0.0)  # which registers don't wait for
        assert (monarch_seconds(in_tiles, 1, shape, dtype="bfloat16") * 1e6 == one) == (shape.out_features < 14336)
        assert monarch_seconds(self.h100, 1, shape, dtype="tf32") * 1e6 > one

    # benchmarks/results/few-tokens-h100; the last one has more programs than are there at once
    @pytest.mark.parametrize(
        ("shape", "microseconds"),
        [
            (MonarchShape(1024, 1024, 2, 2, 128), 4.4),
            (MonarchShape(4096, 1024, 2, 2, 192), 6.8),
            (MonarchShape(4096, 4096, 4, 4, 160), 7.1),
            (MonarchShape(2048, 8192, 4, 4, 128), 6.7),
            (MonarchShape(4096, 14336, 4, 4, 256), 17.2),
        ],
        ids=str,
    )
    def test_few_tokens_whose_factors_are_loaded_at_once(self, shape: MonarchShape, microseconds: float) -> None:
        few, more = monarch_seconds(self.h100, np.array([2, 16]), shape, dtype="bfloat16") * 1e6
        assert few == pytest.approx(microseconds, rel=0.1)
        assert (few == more) == (shape.out_features < 14336)  # the factors are nearly all that is read
        assert monarch_seconds(self.h100, 16, shape, dtype="tf32") * 1e6 > few

    def test_one_token_together_is_held_where_all_products_are(self) -> None:
        shape, options = MonarchShape(4096, 4096, 4, 4, 256), {"dtype": "bfloat16"}
        alone, pair, three = (
            monarch_seconds(self.h100, 1, shape, around=Surroundings(together=count), **options) for count in (1, 2, 3)
        )
        assert alone - self.h100.kernel_launch_s < pair < alone  # a launch less
        assert three > pair  # 384 programs of second halves; 264 are there at once


class TestTraining:
    """Gradients of factors are sums over all tokens with few results."""

    h100 = SHIPPED["h100"]

    def gradients(self, tokens: int, shape: MonarchShape) -> float:
        """Seconds of the gradients of both factors."""
        both = monarch_seconds(self.h100, tokens, shape, dtype="bfloat16", workload="training")
        turned = MonarchShape(shape.out_features, shape.in_features, shape.nblocks_in, shape.nblocks_out, shape.rank)
        forward = sum(monarch_seconds(self.h100, tokens, s, dtype="bfloat16") for s in (shape, turned))
        return float(both - forward)

    def test_sums_are_cut_where_tiles_are_few(self) -> None:
        h100, tokens, shape = self.h100, 16384, MonarchShape(768, 768, 1, 1, 192)
        tiles = 2 * 6  # of 128 x 128
        parts = h100.units // tiles
        compute = h100.units * 2 * 128**2 * (tokens / parts + h100.fill) / h100.peak("bfloat16")
        traffic = 2 * (tokens * (768 + 192) + 768 * 192) / h100.bandwidth_bytes_per_s
        added_up = 2 * 4 * parts * 768 * 192 / h100.bandwidth_bytes_per_s
        overlapped = max(compute, traffic) + (1 - h100.overlap) * min(compute, traffic)
        each = 2 * kernel.SUM_LAUNCH * h100.launch_s + overlapped + added_up
        assert self.gradients(tokens, shape) == pytest.approx(2 * each, rel=1e-6)

    @pytest.mark.parametrize(
        ("tokens", "sizes", "grid", "rank", "gain"),
        [
            (4096, (768, 768), (1, 1), 192, 0.64),
            (4096, (768, 3072), (2, 2), 144, 0.90),
            (4096, (1024, 4096), (4, 4), 96, 1.12),
            (16384, (768, 3072), (1, 1), 304, 1.19),
            (16384, (3072, 768), (4, 4), 64, 1.23),
            (16384, (1024, 1024), (1, 1), 256, 1.04),
            (16384, (4096, 4096), (2, 2), 512, 1.79),
        ],
    )
    def test_gains_are_predicted_as_measured(
        self, tokens: int, sizes: tuple[int, int], grid: tuple[int, int], rank: int, gain: float
    ) -> None:
        """Forward and backward on an H100 (benchmark ``layers-train-gpu``), in no fit."""
        options = {"dtype": "bfloat16", "workload": "training"}
        dense = dense_seconds(self.h100, tokens, *sizes, **options)
        ours = monarch_seconds(self.h100, tokens, MonarchShape(*sizes, *grid, rank), **options)
        assert dense / ours == pytest.approx(gain, rel=0.15)

    def test_sums_of_several_blocks_are_cut_into_few_parts(self) -> None:
        h100, tokens, shape = self.h100, 98304, MonarchShape(64, 2112, 2, 2, rank=32)
        compute = 0.9 * h100.units * 2 * 128**2 * (tokens / 4 + h100.fill) / h100.peak("bfloat16")  # 0.9: of batches
        expected = 0.0
        for side, tiles in ((32, 2), (1056, 2 * 9)):  # one of 128 x 128 for a block; nine for one of 64 x 1056
            traffic = 2 * 2 * (tokens * (64 + side) + 64 * side) / h100.bandwidth_bytes_per_s
            added_up = 2 * 4 * 4 * 2 * 64 * side / h100.bandwidth_bytes_per_s
            both = max(compute, traffic) + (1 - h100.overlap) * min(compute, traffic)
            expected += 2 * kernel.SUM_LAUNCH * h100.launch_s + both + added_up
            assert 4 * tiles < h100.units
        assert self.gradients(tokens, shape) == pytest.approx(expected, rel=1e-6)

    def test_those_of_a_dense_product_are_cut_too(self) -> None:
        h100, tokens, options = self.h100, 98304, {"dtype": "bfloat16"}
        forward = dense_seconds(h100, tokens, 64, 384, **options) + dense_seconds(h100, tokens, 384, 64, **options)
        gradient = dense_seconds(h100, tokens, 64, 384, workload="training", **options) - forward
        parts = h100.units // 3  # 3 tiles of 128 x 128
        compute = h100.units * 2 * 128**2 * (tokens / parts + h100.fill) / h100.peak("bfloat16")
        traffic = 2 * (tokens * (64 + 384) + 64 * 384) / h100.bandwidth_bytes_per_s
        added_up = 2 * 4 * parts * 64 * 384 / h100.bandwidth_bytes_per_s
        overlapped = max(compute, traffic) + (1 - h100.overlap) * min(compute, traffic)
        expected = 2 * kernel.SUM_LAUNCH * h100.launch_s + overlapped + added_up
        assert gradient == pytest.approx(expected, rel=1e-6)


class Block(torch.nn.Module):
    """Attention's projections and a feed-forward net, as in ViT-B/16; attention itself has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(768, 768) for _ in range(4))
        self.up, self.down = torch.nn.Linear(768, 3072), torch.nn.Linear(3072, 768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.o(self.q(x) * self.k(x) + self.v(x))
        return self.down(torch.nn.functional.gelu(self.up(x)))


class TestPlans:
    def plan(self, tokens: int, workload: str = "inference") -> Plan:
        with torch.device("meta"):
            block, x = Block().bfloat16(), torch.empty(2, 8, 768, dtype=torch.bfloat16)
        return plan_model(block, budget=0.5, example_inputs=x, tokens=tokens, device="h100", workload=workload)

    def test_they_know_what_stands_around_products(self) -> None:
        plan = self.plan(4096)
        around = {
            d.candidate.parameter: (d.candidate.bias, d.candidate.activated, d.candidate.together)
            for d in plan.decisions
        }
        assert around["q.weight"] == around["v.weight"] == (True, False, 3)
        assert around["o.weight"] == around["down.weight"] == (True, False, 1)
        assert around["up.weight"] == (True, True, 1)
        assert Plan.from_json(plan.to_json()) == plan


class TestMeasure:
    @pytest.fixture
    def quick(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """Few products, one round, and no judgement of their times: other tests run beside this one."""
        bench = timing.Workbench(
            "float32",
            sizes=((64, 64), (128, 256)),
            tokens=(1, 64),
            peak_size=64,
            pool_bytes=2**20,
            tile=1,
        )
        monkeypatch.setitem(timing.WORKBENCHES, "cpu", bench)
        monkeypatch.setattr(timing, "SLICE_S", 0.002)
        monkeypatch.setattr(timing, "LIMIT_S", 0.0)
        monkeypatch.setattr(fit, "WORST_ERROR", math.inf)
        calls = SimpleNamespace(count=0)

        def counted(device: torch.device) -> object:
            calls.count += 1
            return timing.time_products(device)

        monkeypatch.setattr(measure, "time_products", counted)
        return calls

    def test_measured_once_then_found_by_auto(self, quick: SimpleNamespace, cache: Path) -> None:
        profile = measure_device("cpu")
        assert profile.source.startswith("measured: 24 products in float32")
        assert measure_device(torch.device("cpu")) == profile
        assert resolve("auto", "cpu") == profile
        assert quick.count == 1
        assert len(list(cache.iterdir())) == 1  # no temporary file is left
        measure_device("cpu", force=True)
        assert quick.count == 2

    @pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"name": "cpu"}'])
    def test_a_damaged_file_is_replaced(self, quick: SimpleNamespace, cache: Path, damage: bytes) -> None:
        measure_device("cpu")
        (file,) = cache.iterdir()
        file.write_bytes(damage)
        assert resolve("auto", "cpu") is SHIPPED["cpu"]
        profile = measure_device("cpu")
        assert quick.count == 2
        assert DeviceProfile.from_json(file.read_text()) == profile

    def test_the_key_holds_the_threads(self, quick: SimpleNamespace, cache: Path) -> None:
        profile = measure_device("cpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert resolve("auto", "cpu") is SHIPPED["cpu"]
            assert resolve(profile.name, "cpu") == profile  # by name, whatever the machine is like now
        finally:
            torch.set_num_threads(threads)

    def test_without_a_cache_directory_the_profile_is_returned_all_the_same(
        self, quick: SimpleNamespace, cache: Path
    ) -> None:
        cache.write_text("a file where the directory should be")
        with pytest.warns(MonarchWarning, match="can't be kept"):
            profile = measure_device("cpu")
        assert profile.name.startswith("cpu ")

    def test_random_numbers_of_the_user_go_on_as_before(self, quick: SimpleNamespace) -> None:
        state = torch.get_rng_state()
        measure_device("cpu")
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1), (1, 3)], ids=str)
    def test_what_is_timed_is_the_monarch_product(self, grid: tuple[int, int]) -> None:
        shape = MonarchShape(12, 8, *grid, rank=2)
        x = torch.randn(5, 12, dtype=torch.float64)
        y = torch.empty(5, 8, dtype=torch.float64)
        R = torch.randn(grid[1], grid[0], 2, shape.p, dtype=torch.float64)
        L = torch.randn(grid[0], grid[1], 2, shape.s, dtype=torch.float64)
        made = timing.two_bmm(x, y, shape)(R.flatten(1, 2), L.flatten(1, 2))
        dense = torch.einsum("jkrs,kjrp->jskp", L, R).reshape(8, 12)
        # sums of at most 12 * 2 products of standard normal numbers
        torch.testing.assert_close(made, x @ dense.T, rtol=0, atol=24 * 8 * torch.finfo(torch.float64).eps)

    def test_devices_that_cannot_be_measured(self) -> None:
        with pytest.raises(DeviceProfileError, match="'meta'"):
            measure_device("meta")
        with pytest.raises(DeviceProfileError, match="'abacus'"):
            measure_device("abacus")

    @staticmethod
    def fitted(true: DeviceProfile, noise: float = 0.0) -> tuple[DeviceProfile, np.ndarray, np.ndarray]:
        """The profile fitted to times that ``true`` predicts, its predictions, and those of ``true``."""
        is_cpu = true.name == "cpu"
        cases = timing.products(timing.WORKBENCHES["cpu" if is_cpu else "cuda"])
        dtype = "float32" if is_cpu else "bfloat16"
        times = np.array([fit.predicted(true, case, dtype) for case in cases])
        known = {"tile": true.tile, "units": true.units, "cache_bytes": true.cache_bytes}
        made = fit.fit_profile(
            cases,
            times * np.exp(np.random.default_rng(0).normal(0, noise, len(cases))),
            name="made",
            dtype=dtype,
            relative_peaks={d: peak / true.peak(dtype) for d, peak in true.peak_flops.items()},
            given=known if is_cpu else {**known, "copy_bytes_per_s": true.copy_bytes_per_s},
            expected={} if is_cpu else HOPPER,
        )
        return made, np.array([fit.predicted(made, case, dtype) for case in cases]), times

    # a card whose tiles cost something else than they are expected to
    other = dataclasses.replace(SHIPPED["h200"], overlap=0.3, fill=60.0, launch_s=5e-6, kernel_efficiency=0.6)

    @pytest.mark.parametrize("true", [SHIPPED["cpu"], SHIPPED["h200"], other], ids=["cpu", "h200", "other"])
    def test_the_fit_finds_the_constants_that_made_the_times(self, true: DeviceProfile) -> None:
        made, again, times = self.fitted(true)
        # what is expected and isn't so pulls at some by up to half of the error that times are taken to have
        errors = np.abs(again / times - 1)
        assert np.quantile(errors, 0.95) < 0.05 if true is self.other else errors.max() < 0.01
        near = 0.05 if true is self.other else 0.02
        assert made.peak("bfloat16") == pytest.approx(true.peak("bfloat16"), rel=near)
        assert made.launch_s == pytest.approx(true.launch_s, rel=near)

    def test_what_times_leave_open_stays_as_expected(self) -> None:
        made, again, times = self.fitted(SHIPPED["h200"], noise=0.1)
        # 11 constants from 120 times that are 0.1 off: 0.1 * sqrt(11 / 120) is 0.03, and a median is smaller
        assert np.median(np.abs(again / times - 1)) < 0.03
        found = {name: getattr(made, name) / value for name, value in HOPPER.items()}
        assert found == pytest.approx(dict.fromkeys(HOPPER, 1.0), rel=0.2)

    @pytest.mark.parametrize("major", [8, 9])
    def test_a_gpu_is_expected_to_have_its_own_kernels(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, major: int
    ) -> None:
        """Times as of an H100, or of one without the kernel that runs whole products, which came with Hopper."""
        h100 = SHIPPED["h100"]
        true = h100 if major == 9 else dataclasses.replace(h100, fused_efficiency=0.0)
        cases = timing.products(timing.WORKBENCHES["cuda"])
        times = np.array([fit.predicted(true, case, "bfloat16") for case in cases])
        gpu = SimpleNamespace(multi_processor_count=true.units, L2_cache_size=3 * true.cache_bytes, major=major)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Voodoo 5")
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
        monkeypatch.setattr(measure, "time_products", lambda device: (cases, times))
        monkeypatch.setattr(measure, "relative_peaks", lambda device: {"bfloat16": 1.0, "tf32": 0.5})
        monkeypatch.setattr(measure, "copy_bytes_per_s", lambda device: 1.5e12)
        profile = measure_device("cuda")
        assert profile.name == "cuda Voodoo 5"
        assert (profile.tile, profile.units, profile.copy_bytes_per_s) == (64, true.units, 1.5e12)
        assert profile.fused_efficiency == pytest.approx(true.fused_efficiency, rel=0.05)
        assert profile.peak("bfloat16") == pytest.approx(true.peak("bfloat16"), rel=0.02)
        assert profile.peak("tf32") == profile.peak("bfloat16") / 2

    def test_copies_are_timed(self) -> None:
        assert 1e8 < timing.copy_bytes_per_s(torch.device("cpu")) < 1e12  # between a disk and all the caches of a core

    def test_times_of_a_busy_machine_are_refused(self) -> None:
        cases = timing.products(timing.WORKBENCHES["cpu"])
        times = np.exp(np.random.default_rng(0).normal(-8, 3, len(cases)))
        with pytest.raises(DeviceProfileError, match=r"median error \d+%. Was the machine busy"):
            fit.fit_profile(
                cases,
                times,
                name="cpu",
                dtype="float32",
                relative_peaks={"float32": 1.0},
                given={},
                expected={},
            )
