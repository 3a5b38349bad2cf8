"""The recipes: the tables in types.json are what llama-quantize chose; the rest is what a caller can get wrong."""

import pytest

from qlearn.export import names
from qlearn.export.recipes import SCHEMES, Dimensions, fitting, more_bits, tensor_types
from qlearn.export.sources import sources
from tests.export import tiny
from tests.export.types import WITH_IMATRIX, compact, table

TABLE = table()


def shapes(name):
    model = tiny.model(name)
    return {source.name: source.shape for source in sources(model, names.architecture(model.config.model_type))}


def dimensions(name):
    c = tiny.model(name).config
    return Dimensions(c.model_type, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_type_is_the_one_that_llama_quantize_chooses(name):
    for key, expected in TABLE[name].items():
        scheme, _, given = key.partition(" + ")
        assert compact(tensor_types(scheme, shapes(name), dimensions(name), bool(given))) == expected, key


def test_the_table_has_all_models_and_schemes():
    keys = {*SCHEMES, *(f"{scheme} + imatrix" for scheme in WITH_IMATRIX)} - {"Q2_K_S"}
    assert TABLE.keys() == set(tiny.NAMES)
    assert all(rows.keys() == keys for rows in TABLE.values())


def test_the_table_tells_the_rules_apart():
    """A recipe that forgot one of these rules would fail somewhere above."""
    assert "Q3_K" in TABLE["bundled"]["Q2_K"]["attn_v.weight"]  # two heads share a value
    assert "Q4_K" in TABLE["deep"]["Q2_K"]["attn_v.weight"]  # four do
    assert TABLE["deep"]["Q3_K_M"]["ffn_down.weight"] == "Q5_K*2 Q4_K*31"  # n // 16
    assert TABLE["seventy"]["Q3_K_S"]["attn_v.weight"] == "Q5_1*80"  # Q5_K, and 32 columns
    assert TABLE["qwen3"]["TQ1_0"]["token_embd.weight"] == "Q4_K"  # not tied
    assert TABLE["bitnet"]["TQ1_0"]["token_embd.weight"] == "Q6_K"  # tied
    assert TABLE["odd"]["Q4_K_M"]["ffn_down.weight"] == "F16*4"  # 208 columns
    assert TABLE["deep"]["Q4_0 + imatrix"]["ffn_down.weight"] == "Q4_1*4 Q4_0*29"


@pytest.mark.parametrize(
    ("type", "columns", "expected"),
    [("Q4_K", 256, "Q4_K"), ("Q4_K", 288, "Q5_0"), ("Q5_K", 32, "Q5_1"), ("Q6_K", 32, "Q8_0"), ("Q2_K", 32, "Q4_0"),
     ("TQ1_0", 96, "Q4_0"), ("Q6_K", 80, "F16"), ("Q8_0", 33, "F16"), ("MXFP4", 48, "F16"), ("F32", 7, "F32")],
)  # fmt: skip
def test_a_type_whose_blocks_do_not_fit_gives_way(type, columns, expected):
    assert fitting(type, columns) == expected


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (2, [1]), (7, [2, 5, 6]), (8, [0, 3, 6, 7])])
def test_more_bits_with_few_layers(n, expected):
    assert [i for i in range(n) if more_bits(i, n)] == expected


def test_exceptions_from_the_recipe():
    found = tensor_types(
        "TQ1_0", shapes("bitnet"), dimensions("bitnet"), types={"token_embd.weight": "Q8_0", "blk.0.ffn_*": "F16"}
    )
    assert found["token_embd.weight"] == "Q8_0"
    assert found["blk.0.ffn_up.weight"] == "F16" and found["blk.1.ffn_up.weight"] == "TQ1_0"
    assert found["blk.0.ffn_norm.weight"] == "F32"


def test_the_first_of_two_patterns_that_fit_counts():
    types = {"blk.0.*": "Q8_0", "*": "Q6_K"}
    found = tensor_types("Q4_0", shapes("bundled"), dimensions("bundled"), types=types)
    assert found["blk.0.attn_q.weight"] == "Q8_0" and found["blk.1.attn_q.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("scheme", "types", "message"),
    [
        ("Q4_K_L", None, "scheme 'Q4_K_L' is unknown; choose from F32"),
        ("q4_0", None, "scheme 'q4_0' is unknown"),
        ("Q4_0", {"*": "IQ4_NL"}, "type 'IQ4_NL' of '\\*' cannot be written"),
        ("Q4_0", {"blk.0.attn_norm.weight": "Q8_0"}, "fits no matrix; they are called token_embd.weight"),
        ("Q4_0", {"lm_head": "Q8_0"}, "types='lm_head' fits no matrix"),
        ("Q2_K_S", None, "Q2_K_S without an imatrix makes a broken model; pass imatrix="),
    ],
    ids=["unknown", "lower case", "type that cannot be written", "a norm", "transformers' name", "no imatrix"],
)
def test_wrong_wishes_are_told(scheme, types, message):
    with pytest.raises(ValueError, match=message):
        tensor_types(scheme, shapes("bundled"), dimensions("bundled"), types=types)
