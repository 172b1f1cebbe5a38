"""Costs of half precision on a GPU in sizes that are no multiples of 8: slow kernels, or copies with zeros around."""

import dataclasses

import pytest

from monarch_fx.costs import dense_seconds, kernel, monarch_seconds, predict
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.structure import MonarchShape


class TestUnaligned:
    h100 = SHIPPED["h100"]

    def times(self, tokens: int, shape: MonarchShape, workload: str) -> tuple[float, float]:
        options = {"dtype": "bfloat16", "workload": workload}
        dense = dense_seconds(self.h100, tokens, shape.in_features, shape.out_features, **options)
        return float(dense), float(monarch_seconds(self.h100, tokens, shape, **options))

    @pytest.mark.parametrize(
        ("tokens", "shape", "workload", "dense_us", "ours_us"),
        [
            (98304, MonarchShape(49, 384, 1, 1, 21), "training", 149.8, 190.1),
            (98304, MonarchShape(384, 49, 2, 2, 10), "training", 138.1, 464.9),
            (98304, MonarchShape(384, 196, 4, 4, 16), "inference", 53.9, 141.5),
            (4096, MonarchShape(1020, 1020, 1, 1, 240), "training", 98.5, 109.4),
            (4096, MonarchShape(1020, 1020, 4, 4, 48), "inference", 35.0, 39.5),
            (4096, MonarchShape(1001, 1001, 7, 7, 32), "training", 103.5, 149.5),
            (4096, MonarchShape(4096, 4096, 4, 4, 252), "inference", 177.3, 142.0),
            (4096, MonarchShape(4096, 4096, 4, 4, 255), "training", 530.4, 371.9),
        ],
        ids=str,
    )
    def test_they_are_predicted_as_measured(
        self, tokens: int, shape: MonarchShape, workload: str, dense_us: float, ours_us: float
    ) -> None:
        """The faster one of padded and unpadded dense products, and ours padded as the operator does, on an H100."""
        dense, ours = self.times(tokens, shape, workload)
        assert dense * 1e6 == pytest.approx(dense_us, rel=0.2)
        assert ours * 1e6 == pytest.approx(ours_us, rel=0.25)
        assert (ours < dense) == (ours_us < dense_us)

    def test_ranks_are_padded_by_copies_of_factors(self) -> None:
        h100, shape = self.h100, MonarchShape(4096, 4096, 4, 4, 252)
        extra = self.times(4096, shape, "inference")[1]
        extra -= self.times(4096, dataclasses.replace(shape, rank=256), "inference")[1]
        copied = 2 * 16 * 256 * 1024  # numbers of both factors
        assert extra == pytest.approx(2 * h100.launch_s + 2 * 2 * copied / h100.copy_bytes_per_s, rel=1e-6)

    def test_sides_are_padded_in_training(self) -> None:
        h100, tokens = self.h100, 4096
        shape, padded = MonarchShape(1020, 1024, 4, 4, 48), MonarchShape(1024, 1024, 4, 4, 48)
        extra = self.times(tokens, shape, "training")[1] - self.times(tokens, padded, "training")[1]
        copied = tokens * 1024 + 16 * 48 * 256  # numbers of x and R, and of their gradients
        assert extra == pytest.approx(2 * (2 * h100.launch_s + 2 * 2 * copied / h100.copy_bytes_per_s), rel=1e-6)

    def test_sides_are_padded_where_the_grid_pads_anyway(self) -> None:
        """The copies of x and of the result are taken either way; 3 blocks of 1366 numbers are computed as 1376."""
        h100, tokens = self.h100, 4096
        shape, padded = MonarchShape(4096, 4096, 3, 3, 384), MonarchShape(3 * 1376, 3 * 1376, 3, 3, 384)
        extra = self.times(tokens, shape, "inference")[1] - self.times(tokens, padded, "inference")[1]
        copied = 2 * tokens * 3 * 1376 + 2 * 9 * 384 * 1376  # numbers of x and of the result, and of the factors
        assert extra == pytest.approx(4 * h100.launch_s + 2 * 2 * copied / h100.copy_bytes_per_s, rel=1e-6)

    def test_dense_products_take_the_faster_way(self) -> None:
        h100, tokens = self.h100, 4096
        options = {"dtype": "bfloat16"}
        aligned = dense_seconds(h100, tokens, 4104, 4104, **options)
        copied = tokens * 4104 + 4104 * 4104
        padded = aligned + 2 * h100.launch_s + 2 * 2 * copied / h100.copy_bytes_per_s
        assert dense_seconds(h100, tokens, 4098, 4098, **options) == pytest.approx(padded, rel=1e-6)
        launch_s = h100.launch_s
        slow = kernel.UNALIGNED * (dense_seconds(h100, 128, 1000, 1024, **options) - launch_s) + launch_s
        assert dense_seconds(h100, 128, 1001, 1024, **options) == pytest.approx(slow, rel=0.01)

    @pytest.mark.parametrize("workload", ["inference", "training"])
    def test_few_tokens_read_weights_as_fast_but_rows_of_odd_sizes(self, workload: str) -> None:
        for tokens in (2, 64):
            odd, even, aligned = (
                self.times(tokens, MonarchShape(4 * p, 4096, 4, 4, rank), workload)
                for p, rank in ((1025, 252), (1030, 252), (1032, 256))
            )
            assert odd[0] < even[0] < aligned[0]
            assert even[1] < aligned[1] < 0.8 * odd[1]

    @pytest.mark.parametrize("workload", ["inference", "training"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("h100", {"dtype": "float32"}),
            ("h100", {"dtype": "bfloat16", "batch": 3}),
            ("cpu", {"dtype": "bfloat16"}),
        ],
    )
    def test_other_products_have_other_lowerings(
        self, name: str, options: dict[str, object], workload: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        function = predict._function

        def watched(*lowering: str) -> object:
            asked.append(lowering)
            return function(*lowering)

        monkeypatch.setattr(predict, "_function", watched)
        dense_seconds(SHIPPED[name], 4096, 49, 384, workload=workload, **options)
        monarch_seconds(SHIPPED[name], 4096, MonarchShape(49, 384, 4, 4, 5), workload=workload, **options)
        assert asked == [("dense", workload), ("monarch", workload)]
