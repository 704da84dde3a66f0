"""Rows of tables and datasets as records: pairs, LLaVA conversations, interleaved documents."""

import json
import pickle

import numpy as np
import pytest
from helpers import encoded, picture

from vlmjax.data.formats import rows
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError


@pytest.fixture(name="folder")
def _folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
    return tmp_path


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def opened(folder, name, table):
    (folder / name).write_text(
        json.dumps(table) if name.endswith(".json") else "\n".join(map(json.dumps, table)), encoding="utf-8"
    )
    return open_source(str(folder / name))


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llava(folder, name):
    table = [
        {
            "id": "a",
            "image": "0.png",
            "conversations": turns("<image>\nDescribe.", " A thing. "),
            "model": "m",
        },
        {"id": 7, "conversations": turns("Hello?", "Yes.", "Really?", "No.")},
        {"id": "c", "image": ["0.png", "1.png"], "conversations": turns("<image><image> Same?", "No.")},
        {"id": "d", "image": "0.png", "conversations": turns("<image> One?", "1", "Two?", "2")},
        {"id": "e", "conversations": turns("<image> What?", "?")},
        {"id": "f", "image": "9.png", "conversations": turns("<image>", "x")},
        {"id": "g", "image": "0.png", "conversations": []},
        {"id": "h", "image": "0.png", "conversations": [{"role": "x"}]},
        {
            "id": "i",
            "image": "",
            "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "r"}],
        },
        {"id": "j", "image": "0.png", "conversations": turns("No mark?", "x")},
        {"id": "k", "conversations": [{"from": "bot", "value": "q"}]},
        {"id": "l", "image": "0.png", "conversations": turns("<image>", " ")},
    ]
    source = pickle.loads(pickle.dumps(opened(folder, name, table)))
    assert source[0].image == encoded(picture(0)) and source[0].captions == ("A thing.",)
    assert source[0].extra == {"id": "a", "model": "m", "conversations": table[0]["conversations"]}
    assert source[1].image == b"" and source[1].captions == () and source[1].key == "7"
    assert source[2].image == encoded(picture(0)) and source[2].captions == ()
    assert source[2].extra["images"] == (encoded(picture(0)), encoded(picture(1)))
    assert source[3].captions == () and "images" not in source[3].extra
    assert [turn["from"] for turn in source[8].extra["conversations"]] == ["human", "gpt"]
    for i, reason in (
        (4, "image_marks"),
        (5, "missing_file"),
        (6, "bad_conversation"),
        (7, "bad_conversation"),
        (9, "image_marks"),
        (10, "unknown_role"),
        (11, "empty_answer"),
    ):
        with pytest.raises(BadRecord) as caught:
            source[i]
        assert (caught.value.reason, caught.value.key) == (reason, source.key(i))


def test_messages(folder):
    parts = [{"type": "image", "index": 0, "text": None}, {"type": "text", "text": "\nWhat?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A thing."}]
    inside = [{"type": "text", "text": "Look"}, {"type": "image", "path": "1.png"}]
    linked = [{"type": "image_url", "image_url": {"url": "2.png"}}, {"type": "text", "text": "?"}]
    table = [
        {"messages": [{"role": "system", "content": "Be brief."}, *said], "images": ["0.png"], "source": "x"},
        {
            "messages": [{"role": "user", "content": "<image><image>same?"}, said[1]],
            "images": ["0.png", "1.png"],
        },
        {
            "messages": [
                {"role": "user", "content": inside},
                said[1],
                {"role": "user", "content": linked},
                said[1],
            ]
        },
        {
            "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
            "images": [],
        },
        {"messages": said, "images": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        "damaged",
    ]
    source = opened(folder, "messages.jsonl", table)
    first = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    assert source[0].extra["conversations"] == [{"from": "system", "value": "Be brief."}, *first]
    assert source[0].extra["source"] == "x" and source[0].captions == ("A thing.",)
    assert source[1].extra["images"] == (encoded(picture(0)), encoded(picture(1)))
    assert source[2].extra["images"] == (encoded(picture(1)), encoded(picture(2)))
    assert [turn["value"] for turn in source[2].extra["conversations"]][::2] == ["Look<image>", "<image>?"]
    assert source[3].image == b"" and source[3].extra["conversations"][0] == {
        "from": "human",
        "value": "Hello",
    }
    for i in range(4):
        assert source.turns_at(i) == source[i].extra["conversations"]
    for i, reason in ((4, "image_marks"), (5, "unknown_role"), (6, "bad_row")):
        with pytest.raises(BadRecord, match=reason):
            source[i]
    assert source.turns_at(6) == []


def test_obelics(folder):
    table = [
        {"images": [None, "0.png", None, "1.png"], "texts": ["a", None, "b", None], "general_metadata": "g"},
        {"images": ["0.png", None], "texts": ["both", "b"]},
        {"images": [None], "texts": ["only text"]},
        {"images": [None, "9.png"], "texts": ["a", None]},
    ]
    source = opened(folder, "docs.jsonl", table)
    assert source[0].parts == ("a", encoded(picture(0)), "b", encoded(picture(1)))
    assert source[0].image == encoded(picture(0)) and source[0].captions == ()
    assert source[0].extra == {"general_metadata": "g"}
    assert source[2].parts == ("only text",) and source[2].image == b""
    for i, reason in ((1, "bad_document"), (3, "missing_file")):
        with pytest.raises(BadRecord) as caught:
            source[i]
        assert caught.value.reason == reason


def test_mmc4(folder):
    infos = [
        {"image_name": "1.png", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "0.png", "matched_text_index": 0},
        {"image_name": "2.png", "matched_text_index": 1},
    ]
    table = [
        {"text_list": ["first", "second", "third"], "image_info": infos, "url": "u"},
        {"text_list": ["first"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
        {"text_list": ["alone"], "image_info": []},
    ]
    source = opened(folder, "docs.jsonl", table)
    zero, one, two = (encoded(picture(i)) for i in range(3))
    assert source[0].parts == (zero, "first", one, two, "second", "third") and source.key(0) == "u"
    assert source[2].parts == ("alone",)
    with pytest.raises(BadRecord, match="bad_document"):
        source[1]


def test_lists_of_images_with_texts_are_pairs(folder):
    """Equal lengths, but no turns: several pictures of the same thing with several captions."""
    source = opened(folder, "x.jsonl", [{"images": ["0.png", "1.png"], "texts": ["a", "b"]}])
    assert source[0].captions == ("a", "b") and source[0].image == encoded(picture(0))
    assert source[0].extra["images"] == (encoded(picture(0)), encoded(picture(1)))


def test_images_in_every_form(folder):
    load, data = rows.Loader(str(folder)), encoded(picture(0))
    pixels = np.zeros((2, 2, 3), np.uint8)
    for value in (
        data,
        "0.png",
        str(folder / "0.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": "0.png"},
    ):
        assert load(value, "k") == data
    assert load(pixels, "k") is pixels
    for value in (None, "", 3, {"bytes": None, "path": None}, {}):
        with pytest.raises(BadRecord) as caught:
            load(value, "k")
        assert caught.value.reason == "no_image"
    with pytest.raises(DataError, match="no column for an image"):
        rows.find_layout("x", {"picture of": 1, "caption": 2})
