"""Costs where this library's kernels run: halves, few tokens, what stands around products, training, plans."""

import dataclasses

import numpy as np
import pytest
import torch
from hand_counts import PROFILE, count

from monarch_fx import Plan
from monarch_fx import plan as plan_model
from monarch_fx.costs import (
    Surroundings,
    dense_seconds,
    formulas,
    kernel,
    monarch_seconds,
    symbols,
)
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.kernels import choice
from monarch_fx.structure import MonarchShape


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
        ("grid", "rank", "is_own", "launches"),
        [
            ((8, 2), 128, True, 0),  # both halves are ours
            ((1, 4), 256, False, 1.58),  # a library's, the first one a batched product
            ((4, 1), 256, True, 2),  # the second one, a full wave, is ours behind a library's
        ],
        ids=str,
    )
    def test_second_halves_start_early_behind_our_own_first_ones(
        self, grid: tuple[int, int], rank: int, is_own: bool, launches: float
    ) -> None:
        h100, shape = SHIPPED["h100"], MonarchShape(4096, 4096, *grid, rank)
        n_out, n_in, units = *grid, h100.units
        after_library = choice.library_tokens(n_in, n_out, rank, shape.p, units, 2) <= 1024
        sizes = 1024, shape.s, n_in * rank, n_out, units
        assert choice.is_own_second(*sizes, after_library=after_library) == is_own
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

        def saved(tokens: int, together: int, workload: str = "inference", **changes: float) -> float:
            profile, options = dataclasses.replace(self.h100, **changes), {"dtype": "bfloat16", "workload": workload}
            around = Surroundings(beside=(4096,) * (together - 1))
            alone = monarch_seconds(profile, tokens, shape, **options)
            return float(alone - monarch_seconds(profile, tokens, shape, around=around, **options))

        for together, shared in ((1, 0), (2, 1), (3, 4 / 3), (8, 4 / 3)):  # of a product's two launches
            hidden = saved(40, together, kernel_overlap=1.0)
            assert hidden == pytest.approx(shared * self.h100.kernel_launch_s, rel=1e-6)
            assert saved(40, together) == hidden if together == 1 else saved(40, together) > hidden
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
        in_tiles = dataclasses.replace(
            self.h100, kernel_overlap=0.0
        )  # which is of kernels that compute and load in turn
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

        def each(*beside: int, **changes: float) -> float:
            profile = dataclasses.replace(self.h100, **changes)
            return float(monarch_seconds(profile, 1, shape, around=Surroundings(beside=beside), **options))

        assert each() - self.h100.kernel_launch_s < each(4096) < each()  # a launch less
        for beside, are_held in ((4096,), True), ((1024, 1024), True), ((4096, 4096), False):
            # 384 programs of second halves are too many, 264 are there at once; kernels that hold factors don't overlap
            assert (each(*beside) == each(*beside, kernel_overlap=0.0)) == are_held


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
        found = {d.candidate.parameter.removesuffix(".weight"): d.candidate for d in plan.decisions}
        around = {name: (c.bias, c.activated, c.beside) for name, c in found.items()}
        assert around["q"] == around["v"] == (True, False, (768, 768))
        assert around["o"] == around["down"] == (True, False, ())
        assert around["up"] == (True, True, ())
        assert found["q"].activation == found["k"].activation == found["v"].activation
        assert len({c.activation for c in found.values()}) == len(found) - 2
        assert Plan.from_json(plan.to_json()) == plan
