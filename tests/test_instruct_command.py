"""Conversations by a language model of this machine: its answers against transformers, and one line for mistakes."""

import json

import pytest
import transformers

pytest.importorskip("torch")

from tests.parity import tiny
from tests.test_generate_command import tokenizer
from vlmjax import instruct
from vlmjax.data.instruct_models import Unanswered
from vlmjax.data.instruct_prompts import context_of, kind_of, messages
from vlmjax.data.scenes import open_scenes

TOKENS = 12
KINDS = "conversation:58,detail:23,reasoning:77"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A folder whose chat template knows a system message, with room for the long prompts."""
    return written(tmp_path_factory.mktemp("talker"), 4096)


def written(path, positions, chat=True):
    words = tokenizer(chat)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiny.redraw(transformers.LlamaForCausalLM(config)).save_pretrained(path)
    words.save_pretrained(path)
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def theirs(folder, asked):
    """The greedy answer, and whether it was cut."""
    import torch

    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    ends = [2, words.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
    ended = [place for place, token in enumerate(out) if token in ends]
    return words.decode(out[: min(ended, default=len(out))], skip_special_tokens=True).strip(), not ended


def test_answers_are_those_of_transformers(talker, tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    asked = ["scenes", "--limit=3", f"--local={talker}", "--temperature=0", f"--max_tokens={TOKENS}"]
    instruct.main([*asked, f"--out={tmp_path / 'a.jsonl'}", f"--record={kept}"])
    source = open_scenes("scenes")
    for i, row in enumerate(lines(kept)):
        context = context_of(source[i])
        text, was_cut = theirs(talker, messages(context, kind_of(context.key, instruct.parse_kinds(KINDS))))
        assert (row["response"], row["cut"]) == (text, was_cut)
    assert len(lines(kept)) == 3 and "rejected/" in capsys.readouterr().out


def test_what_is_drawn_depends_on_the_key_alone(talker):
    options = {"temperature": 0.9, "max_tokens": TOKENS}
    model = instruct.Local(str(talker), seed=3, **options)
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a grey seal"}]
    first = [model(asked, key, "detail") for key in ("a", "b", "c")]
    assert [model(asked, key, "detail") for key in ("c", "b", "a")] == first[::-1]
    assert len(set(first)) == 3 and model(asked, "a", "reasoning") != first[0]
    assert instruct.Local(str(talker), seed=4, **options)(asked, "a", "detail") != first[0]


def test_answers_that_end_are_whole(talker, monkeypatch):
    model = instruct.Local(str(talker), temperature=0.0, max_tokens=4, seed=0)
    asked = [{"role": "user", "content": "a"}]
    for made, cut in (([40, 41], False), ([40, 41, 42, 43], True), ([], False)):
        monkeypatch.setattr(instruct.generate, "tokens", lambda *_, made=made: iter(made))
        assert model(asked, "k", "detail").cut is cut


def test_a_request_without_room_is_not_answered(tmp_path):
    model = instruct.Local(str(written(tmp_path, 256)), temperature=0.0, max_tokens=4, seed=0)
    with pytest.raises(Unanswered, match="the prompt has .* tokens, the model takes 256"):
        model(messages(context_of(open_scenes("scenes")[0]), "detail"), "k", "detail")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "nobody to ask: give one of --endpoint"),
        (("--local=x", "--endpoint=http://h/v1"), "--endpoint and --local exclude each other"),
        (("--endpoint=http://h/v1",), "give --model, its name there"),
        (("--local=nowhere",), "nowhere"),
        (("--local=x", "--temperature=-1"), "--temperature=-1"),
        (("--local=x", "--max_tokens=0"), "--max_tokens=0"),
    ],
)
def test_mistakes_in_one_line(options, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        instruct.main(["scenes", f"--out={tmp_path / 'x.jsonl'}", *options])
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


def test_a_model_whose_turns_nobody_knows_how_to_write(tmp_path, capsys):
    folder = written(tmp_path, 256, chat=False)
    with pytest.raises(SystemExit):
        instruct.main(["scenes", f"--out={tmp_path / 'x.jsonl'}", f"--local={folder}"])
    assert "a conversation needs a template" in capsys.readouterr().err
