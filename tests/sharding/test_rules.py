"""Rules on parameter paths: first match wins, everything covered, and every mistake named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import format_table, match_rules, path_of, shardings


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


PARAMS = {
    "vision": {
        "layers": {"fc1": {"kernel": shape(3, 8, 16), "bias": shape(3, 16)}},
        "norm": {"scale": shape(8)},
    },
    "text": {"embedding": shape(10, 8)},
    "logit_scale": shape(),
}
RULES = [
    (r".*/fc1/kernel", (None, "fsdp", "tensor")),
    (r"text/embedding", (None, ("data", "fsdp"))),
    (r".*", ()),
]


def test_paths_are_joined_keys():
    leaves = jax.tree_util.tree_flatten_with_path({"a": {"b": [1, {"c": 2}]}})[0]
    assert [path_of(keypath) for keypath, _ in leaves] == ["a/b/0", "a/b/1/c"]


def test_first_match_wins_and_values_may_be_tuples_or_numbers():
    tree = {"a": {"kernel": 0, "bias": 0}, "b": {"kernel": 0}}
    got = match_rules([("a/.*", 0.1), (".*/kernel", (1, 2))], tree)
    assert got == {"a": {"kernel": 0.1, "bias": 0.1}, "b": {"kernel": (1, 2)}}


def test_a_rule_must_match_the_whole_path():
    with pytest.raises(RecipeError, match="'kernel' matches no parameter; .* such as a/kernel"):
        match_rules([("kernel", 1), (".*", 0)], {"a": {"kernel": 0}})
    assert match_rules([("a", 1), (".*", 0)], {"a": 0, "ab": 0}) == {"a": 1, "ab": 0}


def test_an_uncovered_parameter_is_named():
    with pytest.raises(RecipeError, match="no rule covers b/kernel"):
        match_rules([("a/.*", 1)], {"a": {"kernel": 0}, "b": {"kernel": 0}})
    assert match_rules([("a", 2)], {"a": 0, "b": 0}, default=1) == {"a": 2, "b": 1}
    assert match_rules([], {"a": 0}, default=None) == {"a": None}


def test_a_rule_that_matches_nothing_is_named():
    with pytest.raises(RecipeError, match="wd: 'encoder/.*' matches no parameter; paths look like a/kernel"):
        match_rules([("encoder/.*", 1), (".*", 0)], {"a": {"kernel": 0}}, what="wd")
    with pytest.raises(RecipeError, match="matches no parameter"):
        match_rules([("encoder/.*", 1)], {"a": 0}, default=0)


def test_a_rule_behind_one_that_takes_everything_is_named():
    with pytest.raises(RecipeError, match=r"'a/.*' never decides: '.*' comes before it and takes a/kernel"):
        match_rules([(".*", 1), ("a/.*", 0)], {"a": {"kernel": 0}})


def test_a_catch_all_at_the_end_may_be_idle():
    assert match_rules([("a", 1), (".*", 0)], {"a": 0}) == {"a": 1}


def test_a_bad_expression_is_named():
    with pytest.raises(RecipeError, match=r"'a\(' is not a regular expression"):
        match_rules([("a(", 1)], {"a": 0})


def test_shardings_place_what_the_rules_say():
    mesh = make_mesh(2, 2, 2)
    placed = shardings(RULES, PARAMS, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(PARAMS)
    assert placed["vision"]["layers"]["fc1"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["text"]["embedding"].spec == PartitionSpec(None, ("data", "fsdp"))
    assert placed["logit_scale"].is_fully_replicated
    kernel = jax.device_put(np.zeros((3, 8, 16), np.float32), placed["vision"]["layers"]["fc1"]["kernel"])
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 4, 8)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("fsdp", None, None), r"kernel\[6, 8\] .* 3 entries for 2 dimension"),
        (("fsdp",), r"kernel\[6, 8\] as \('fsdp',\): dimension 0 of 6 cannot be cut into 4"),
        ((None, "model"), "no axis 'model', the mesh has data, fsdp, tensor"),
        (("tensor", "tensor"), "axis 'tensor' is used twice"),
        ("fsdp", "a spec is a tuple"),
        (None, "a spec is a tuple"),
    ],
)
def test_specs_that_cannot_be_are_refused_with_the_parameter(spec, message):
    with pytest.raises(RecipeError, match=message) as error:
        shardings([(".*", spec)], {"a": {"kernel": shape(6, 8)}}, make_mesh(1, 4, 2))
    assert "a/kernel" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_says_where_everything_is():
    table = format_table(RULES, PARAMS, make_mesh(2, 2, 2)).splitlines()
    assert len(table) == 1 + 5 + 1
    kernel = next(line for line in table if "fc1/kernel" in line)
    assert kernel.split() == [
        "vision/layers/fc1/kernel",
        "3x8x16",
        "float32",
        "-,",
        "fsdp,",
        "tensor",
        "384",
        "B",
    ]
    embedding = next(line for line in table if "text/embedding" in line)
    assert embedding.split()[3:] == ["-,", "data+fsdp", "80", "B"]
    assert next(line for line in table if "logit_scale" in line).split()[1:] == [
        "scalar",
        "float32",
        "copied",
        "4",
        "B",
    ]
    # 3*8*16 + 3*16 + 8 + 10*8 + 1 floats, of which the kernel is cut in 4 and the embedding in 4.
    assert table[-1].split() == ["all", "2.0", "KiB", "in", "all", "692", "B"]
