from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.model import keys
from ckptd.model.keys import ChunkId, StepId

step_ids = st.builds(StepId, st.integers(0, keys.MAX_ATTEMPT), st.integers(0, keys.MAX_STEP))
hashes = st.text("0123456789abcdef", min_size=32, max_size=32)
CHUNK = f"chunks/3f/3f{'0' * 30}-000000001000-0007"


@given(step_ids, st.integers(0, keys.MAX_RANK), hashes)
def test_what_is_made_is_read_back(step, rank, hash_):
    chunk = ChunkId(hash_, step)
    assert StepId.parse(str(step)) == step
    assert keys.parse_checkpoint(keys.checkpoint(step)) == step
    assert keys.parse_rank(keys.rank(step, rank)) == (step, rank)
    assert keys.parse_chunk(chunk.key) == chunk
    assert keys.parse_attempt(keys.attempt(step.attempt)) == step.attempt
    made = [keys.checkpoint(step), keys.rank(step, rank), chunk.key, keys.attempt(step.attempt)]
    assert all(keys.is_key(key) for key in made)


@given(st.lists(step_ids, min_size=2, max_size=5))
def test_step_ids_sort_by_attempt_first_and_keys_by_step_first(ids):
    assert sorted(ids) == sorted(ids, key=lambda i: (i.attempt, i.step))
    assert sorted(map(str, ids)) == [str(i) for i in sorted(ids, key=lambda i: (i.step, i.attempt))]


def test_names_are_as_documented():
    step = StepId(attempt=7, step=1000)
    assert keys.checkpoint(step) == "checkpoints/000000001000-0007"
    assert keys.rank(step, 3) == "ranks/000000001000-0007/00003"
    assert keys.attempt(7) == "attempts/0007"
    assert ChunkId("3f" + "0" * 30, step).key == CHUNK
    assert step.short == "1000-0007"


PARSERS = (keys.parse_attempt, keys.parse_rank, keys.parse_checkpoint, keys.parse_chunk)
STRANGE = [
    "",
    "/",
    "checkpoints/",
    "checkpoints/latest",
    "checkpoints/1000-0007",
    "checkpoints/000000001000-0007\n",
    "checkpoints/000000001000-0007/",
    "/checkpoints/000000001000-0007",
    "Checkpoints/000000001000-0007",
    "checkpoints/00000000100٣-0007",
    "xcheckpoints/000000001000-0007",
    "ranks/000000001000-0007",
    "ranks/000000001000-0007/3",
    "ranks/000000001000-0007/000003",
    "attempts/7",
    "attempts/00007",
    "attempts/../0007",
    CHUNK.replace("chunks/3f", "chunks/3e"),
    CHUNK.upper(),
    CHUNK[:-1],
    CHUNK + ".tmp",
]


@pytest.mark.parametrize("text", STRANGE)
def test_g7_names_outside_of_the_grammar_are_not_ours(text):
    assert [parse(text) for parse in PARSERS] == [None] * 4


@given(st.text())
def test_any_text_is_parsed_or_is_none(text):
    for parse in PARSERS:
        parse(text)


@pytest.mark.parametrize("text", ["", "1000-0007", "000000001000-0007 ", "000000001000_0007"])
def test_a_step_id_is_only_its_form_in_keys(text):
    with pytest.raises(ValueError, match="not a step id"):
        StepId.parse(text)


@pytest.mark.parametrize(
    "text",
    ["../x", "a/../b", "a//b", "/a", "a/", "a/b/c/d", "a\\b", "a b", "a\0", "é", "a\n", "a" * 201],
)
def test_s4_traversal_and_odd_characters_are_no_keys(text):
    assert not keys.is_key(text)


def test_the_root_record_is_a_key():
    assert keys.is_key(keys.ROOT_RECORD)
    assert not keys.is_key("ckptd.jsonx")


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 32 + "\n"])
def test_a_hash_is_32_lower_case_hex_digits(text):
    assert not keys.is_hash(text)
    assert keys.is_hash("0123456789abcdef" * 2)
