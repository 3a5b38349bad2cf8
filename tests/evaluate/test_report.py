"""A row holds what the single measures say, and a table shows it."""

import pytest

from qlearn.evaluate import Reference, Row, compare, parse_rate, perplexity, report, table
from qlearn.evaluate.size import bits_per_weight, model_bytes


def row(name="absmax 4", perplexity=8.3871, **changes):
    figures = {
        "kl_divergence": 0.04123, "flip_rate": 0.1373, "same_top_p": 86.27, "parse_rate": 0.625,
        "bits_per_weight": 4.25, "bytes": 5_450_000, "seconds": 9.13,
    }  # fmt: skip
    return Row(name, perplexity, **(figures | changes))


def test_a_report_with_a_reference(model, other_model, tokenizer, text):
    reference = Reference(model, tokenizer, text)
    measured = report(other_model, tokenizer, reference, name="other").as_dict()
    compared = compare(other_model, reference)
    assert measured.pop("seconds") > 0
    assert measured == {
        "name": "other",
        "perplexity": compared.perplexity,
        "kl_divergence": compared.kl_divergence,
        "flip_rate": compared.flip_rate,
        "same_top_p": compared.same_top_p,
        "parse_rate": None,
        "bits_per_weight": bits_per_weight(other_model),
        "bytes": model_bytes(other_model),
    }


def test_a_report_without_a_reference_measures_the_text_that_ships(model, tokenizer):
    measured = report(model, tokenizer, tokens=50)
    assert measured.perplexity == pytest.approx(perplexity(model, tokenizer, tokens=50), rel=1e-12)
    assert measured.kl_divergence is measured.flip_rate is measured.same_top_p is measured.parse_rate is None


def test_a_report_with_the_parse_rate(model, tokenizer, monkeypatch):
    monkeypatch.setattr("qlearn.evaluate.parse.function_headers", lambda: ["def f(x):", "def g(x):"])
    model.config.max_position_embeddings = 128  # room for 96 new tokens
    assert report(model, tokenizer, tokens=20, parse=True).parse_rate == parse_rate(model, tokenizer) == 0.0


def test_tokens_must_not_contradict_the_reference(model, tokenizer, text):
    reference = Reference(model, tokenizer, text, tokens=40)
    assert report(model, tokenizer, reference, tokens=40).kl_divergence == 0
    with pytest.raises(ValueError, match="tokens=20, but the reference was run on 40"):
        report(model, tokenizer, reference, tokens=20)


def test_a_row_prints_as_one_row():
    assert repr(row()).splitlines() == [
        "name      perplexity     KLD  flips %  same top %  parse %  bits/weight    MB",
        "absmax 4       8.387  0.0412     13.7        86.3       62        4.250  5.45",
    ]


def test_a_table_in_three_forms():
    both = table([row(), row("a|b<c>", 263.14, parse_rate=None)])
    assert repr(both).splitlines()[2].split() == ["a|b<c>", "263.1", "0.0412", "13.7", "86.3", "4.250", "5.45"]
    assert both._repr_markdown_().splitlines() == [
        "| name | perplexity | KLD | flips % | same top % | parse % | bits/weight | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| absmax 4 | 8.387 | 0.0412 | 13.7 | 86.3 | 62 | 4.250 | 5.45 |",
        "| a\\|b<c> | 263.1 | 0.0412 | 13.7 | 86.3 |  | 4.250 | 5.45 |",
    ]
    assert "<td>a|b&lt;c&gt;</td><td>263.1</td>" in both._repr_html_()
    assert both._repr_html_().count("<tr>") == 3


def test_time_is_shown_on_request_only():
    assert "9.1" not in repr(table([row()]))
    assert table([row()], seconds=True).cells()[1][-1] == "9.1"


def test_columns_nobody_measured_are_left_out():
    bare = row(kl_divergence=None, flip_rate=None, same_top_p=None, parse_rate=None)
    assert table([bare]).cells()[0] == ["name", "perplexity", "bits/weight", "MB"]


@pytest.mark.parametrize(
    "value, shown", [(1.0, "1.000"), (48123.7, "48124"), (2.5e9, "2.500e+09"), (float("inf"), "inf")]
)
def test_perplexities_of_any_size_can_be_shown(value, shown):
    assert table([row(perplexity=value)]).cells()[1][1] == shown


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        table([])
