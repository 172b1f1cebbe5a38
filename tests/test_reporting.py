import math

import pytest

from monarch_fx.records import Call, Candidate, Decision, Declined, Plan, Report
from monarch_fx.reporting.tables import compact, milliseconds, shorten
from monarch_fx.structure import MonarchShape
from monarch_fx.views import MatrixView

LONG = "model.decoder.layers.{}.self_attention.attention.out_proj.linear.base_layer.weight"


def candidate(name: str, in_features: int, out_features: int, *, calls: int = 1, batch: int = 1) -> Candidate:
    size = in_features * out_features
    view = MatrixView(((batch, size),) if batch > 1 else (), ((out_features, in_features),), ((in_features, 1),))
    each = tuple(Call("s0*s1", 2048) for _ in range(calls))
    return Candidate(name, name, (out_features, in_features), view, "linear", each, "float32")


def rewritten(name: str, *, batch: int = 1, calls: int = 1) -> Decision:
    shape = MonarchShape(768, 3072, nblocks_out=4, nblocks_in=4, rank=32)
    pays = (1, 64), (384, None)
    return Decision(candidate(name, 768, 3072, batch=batch, calls=calls), shape, "chosen", 0.3125, 2e-3, 1e-3, pays)


def make_plan(decisions: list[Decision], declined: tuple[Declined, ...] = (), **changes: object) -> Plan:
    fields: dict = {
        "budget": 0.5,
        "tokens": ((2048, 1.0),),
        "tokens_source": "from example_inputs",
        "workload": "inference",
        "dtype": "float32",
        "device": "cpu",
        "error_source": "block spectra of the weights",
        "model_params": 10_000_000,
        "fingerprint": "f",
        "capture": "torch.export",
    }
    return Plan(tuple(decisions), declined, **{**fields, **changes})


def row(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_a_rewritten_product_shows_its_structure_and_what_it_gains():
    line = row(str(make_plan([rewritten("up.weight")])), "up.weight")

    for part in ("linear", "768 -> 3072", "2048", "4x4 r32", "2.36M->492k", "0.312", "2.00->1.00", "1-64, 384+"):
        assert part in line


def test_dense_and_declined_products_show_why():
    dense = Decision(candidate("pooler.weight", 64, 64), None, "slower at 8 tokens", 0.0, 1e-5, 1e-5, ())
    declined = (
        Declined("head.weight", "linear", 64, 1000, 64000, 1, "tied to embedding.weight"),
        Declined("scores", "matmul", 64, 128, 0, 12, "both operands are activations"),
    )
    text = str(make_plan([dense], declined))

    assert row(text, "pooler.weight").endswith("slower at 8 tokens")
    assert row(text, "head.weight").endswith("64.0k tied to embedding.weight")
    assert row(text, "scores").endswith("- both operands are activations")
    assert "Rewritten" not in text


def test_the_header_says_what_the_plan_was_made_for():
    text = str(make_plan([rewritten("up.weight")], notes=("Heads are excluded by default.",)))

    assert "asked 0.5, reached 0.208" in text
    assert "1 products, 2.36M -> 492k parameters; 1 rewritten, which hold 100% of them" in text
    assert "10.0M -> 8.13M parameters (81%)" in text
    assert "2.00 -> 1.00 ms a run in these products (2.00x)" in text
    assert "cpu, float32, inference, 2,048 tokens (from example_inputs)" in text
    assert "block spectra of the weights" in text
    assert "torch.export" in text
    assert "Heads are excluded by default." in text


def test_an_edited_product_shows_that_nothing_was_predicted():
    plan = make_plan([rewritten("up.weight")]).with_shape("up.weight", nblocks_out=2, nblocks_in=2, rank=16)
    text = str(plan)

    assert row(text, "up.weight").split()[-3:] == ["?", "2.00->?", "?"]
    assert "2.00 -> ? ms" in text


def test_a_forced_structure_has_no_budget():
    assert "structure forced, reached 0.208" in str(make_plan([rewritten("up.weight")], budget=None))


def test_calls_and_several_planned_token_counts():
    text = str(make_plan([rewritten("up.weight", calls=2)], tokens=((2048, 1.0), (1, 128.0))))

    assert "2048 x2 | 1 x2" in row(text, "up.weight")
    assert "2,048, 1 (weight 128) tokens" in text


def test_a_batch_of_matrices_shows_its_size():
    assert "8 x 768 -> 3072" in row(str(make_plan([rewritten("experts", batch=8)])), "experts")


def test_a_report_shows_what_was_done_and_what_was_not():
    plan = make_plan([rewritten("up.weight"), rewritten("down.weight")])
    text = str(Report(plan, (("up.weight", 0.4375),), "project", 10_000_000, 8_132_416, 1.25, (("torch", "2.13.0"),)))

    assert "1 of 2 planned products projected in 1.2 s" in text
    assert "10,000,000 -> 8,132,416" in text
    assert "torch 2.13.0" in text
    assert "measured on the factors" in text
    assert "0.438" in row(text, "up.weight")
    assert text.index("Planned, not done (1)") < text.index("down.weight")


def test_every_line_fits_and_is_plain_text():
    decisions = [rewritten(LONG.format(i), calls=i + 1) for i in range(12)]
    reason = "predicted slower than dense at 8 tokens, where launching two products costs more than they save; " * 2
    decisions += [Decision(candidate(LONG.format("99"), 64, 64), None, reason, 0.0, 1e-5, 1e-5, ())]
    declined = (Declined(LONG.format("99") + "[0:64]", "linear", 64, 64, 4096, 1, reason),)
    text = str(make_plan(decisions, declined, error_source="estimated by a prior " * 12))

    assert max(len(line) for line in text.splitlines()) <= 120
    assert text.isascii()
    assert "\x1b" not in text
    for i in range(12):  # the shortened names still tell the layers apart
        assert sum(line.startswith(f"m.d.l.{i}.") for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("blocks.0.fc.weight", 20, "blocks.0.fc.weight"),
        ("encoder.layer.11.fc.weight", 24, "e.layer.11.fc.weight"),
        ("encoder.layer.11.fc.weight", 17, "e.l.11.fc.weight"),
        ("in_proj_weight[0:768]", 10, "in_p..768]"),
    ],
)
def test_long_names_keep_their_ends(name: str, width: int, short: str):
    assert shorten(name, width) == short
    assert len(short) <= width


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1000, "1.00k"), (999_600, "1.00M"), (589_824, "590k"), (8_030_261_248, "8.03B")],
)
def test_counts_have_three_digits(count: int, text: str):
    assert compact(count) == text


def test_unknown_times_are_marked():
    assert milliseconds(math.nan) == "?"
    assert milliseconds(0.0123456) == "12.3"
