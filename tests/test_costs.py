"""Cost formulas against hand counts, profiles, predictions and the measurement of a device."""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hand_counts import PROFILE, count
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_fx.costs import (
    DeviceProfile,
    dense_seconds,
    fit,
    formulas,
    kernel,
    measure,
    measure_device,
    monarch_seconds,
    paying_tokens,
    resolve,
    timing,
)
from monarch_fx.costs.predict import MOST_TOKENS
from monarch_fx.costs.shipped import HOPPER, SHIPPED
from monarch_fx.errors import DeviceProfileError, MonarchWarning
from monarch_fx.structure import MonarchShape


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
