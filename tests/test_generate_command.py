"""The generate command: its text against transformers, conversations, interruptions, one line for every mistake."""

import io
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image

pytest.importorskip("torch")

from tests.capfilt import models as capfilt_models
from tests.parity import tiny
from vlmjax import decode, generate, hub
from vlmjax.data.conversation import Message, Part
from vlmjax.errors import UserError
from vlmjax.models import blip_tasks
from vlmjax.models.blip_start import from_pretraining
from vlmjax.models.blip_tasks import BlipVqa

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat: bool):
    """Bytes and their most frequent pairs."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["a grey seal sings in the sea", "the seal is grey"], trainer)
    out = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        out.chat_template = CHAT
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama"), False)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chat"), True)


def write(path, chat):
    words = tokenizer(chat)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tiny.redraw(transformers.LlamaForCausalLM(config)).save_pretrained(path)
    words.save_pretrained(path)
    return path


def parse(*arguments):
    generate.FLAGS.unparse_flags()
    for name in generate.FLAGS:
        generate.FLAGS[name].unparse()
    generate.parse(["generate", *arguments])
    return generate.FLAGS


def run(*arguments):
    parse(*arguments)
    (generate.chat if generate.FLAGS.chat else generate.generate)(generate.FLAGS)


def reference(path, text, new=12, **options):
    words = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.LlamaForCausalLM.from_pretrained(path)
    ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=ids * 0 + 1,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_is_continued_as_transformers_does(folder, beams, capsys):
    run(f"--model={folder}", "--prompt=the seal", "--max_new_tokens=12", f"--num_beams={beams}")
    written = capsys.readouterr().out
    assert written.strip() == reference(folder, "the seal", num_beams=beams).strip() != ""


def test_a_t5_answers_a_closed_prompt(tmp_path, capsys):
    """Its tokenizer closes texts; the command encodes in pieces and closes by itself."""
    words = tokenizer(False)
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(words)}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = tiny.redraw(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids)))
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    run(f"--model={tmp_path}", "--prompt=is the seal grey?", "--max_new_tokens=12")
    asked = words("is the seal grey?", return_tensors="pt").input_ids
    assert asked[0, -1] == 2
    out = model.generate(asked, max_new_tokens=12, do_sample=False)
    assert capsys.readouterr().out.strip() == words.decode(out[0], skip_special_tokens=True).strip() != ""


def test_text_comes_piece_by_piece_and_stops(folder, capsys):
    options = parse(f"--model={folder}", "--prompt=the seal", "--max_new_tokens=12")
    speaker = generate.open_speaker(options)
    inputs = generate.inputs_of(speaker, [generate.message("the seal", 0)], [])
    pieces = list(generate.answer(speaker, inputs, options))
    assert len(pieces) > 3
    stop = pieces[3]
    before = "".join(pieces)[: "".join(pieces).index(stop)]
    run(f"--model={folder}", "--prompt=the seal", "--max_new_tokens=12", f"--stop={stop}")
    assert capsys.readouterr().out == before + "\n"
    drawn = ["--temperature=3", "--top_k=40", "--top_p=0.95", "--seed=5"]
    run(f"--model={folder}", "--prompt=the seal", "--max_new_tokens=12", *drawn)
    assert capsys.readouterr().out not in ("".join(pieces) + "\n", "\n")


def test_a_conversation_in_the_tokenizers_own_words(talker, capsys):
    """Both turns by transformers: the second prompt holds the first answer."""
    lines = iter(["the seal", "", "grey?", "/clear", "the seal", "/exit"])
    generate.chat(parse(f"--model={talker}", "--chat", "--max_new_tokens=12"), lambda _: next(lines))
    turns, wanted = [], []
    for said in ("the seal", "grey?"):
        turns.append({"role": "user", "content": said})
        words = transformers.AutoTokenizer.from_pretrained(talker)
        prompt = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        wanted.append(reference(talker, prompt).strip())
        turns.append({"role": "assistant", "content": wanted[-1]})
    written = capsys.readouterr().out
    body = written.partition("leaves.\n")[2]
    assert body == "".join(one + "\n" for one in (*wanted, wanted[0]))


def test_ctrl_c_ends_the_answer_and_then_the_conversation(talker, capsys, monkeypatch):
    def interrupted(*_):
        yield "half an"
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(generate, "answer", interrupted)
    monkeypatch.setattr(
        generate, "inputs_of", lambda speaker, talk, *_: seen.append([m.text for m in talk]) or {}
    )

    def ask(_):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return "go on"

    generate.chat(parse(f"--model={talker}", "--chat"), ask)
    assert seen == [["go on"], ["go on", "half an", "go on"]]
    assert capsys.readouterr().out.count("half an (interrupted)\n") == 2
    with pytest.raises(UserError) as stopped:
        run(f"--model={talker}", "--prompt=x")
    assert stopped.value.exit_code == 130


class Seeing(nn.Module):
    """Stands for a model with images: each is two tokens."""

    config = types.SimpleNamespace(image_tokens=2, image_token_id=7)

    def image_features(self, pixel_values):
        """Never asked for here."""
        return pixel_values


class Crop:
    """Stands for an image transform."""

    def __call__(self, image):
        return image[:2, :2]

    def normalize(self, pixels):
        return pixels / np.float32(9)


def test_images_go_where_the_prompt_says(folder, tmp_path):
    speaker = generate.open_speaker(parse(f"--model={folder}", "--prompt=x"))
    seeing = speaker._replace(model=Seeing(), transform=Crop())
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "a.png")
    pixels = generate.read_image(str(tmp_path / "a.png"))
    for text, parts in (("what <image>?", ("what ", None, "?")), ("what?", (None, "\nwhat?"))):
        said = generate.message(text, 1)
        assert said == Message("user", tuple(Part("text", x) if x else Part("image") for x in parts))
        inputs = generate.inputs_of(seeing, [said], [pixels])
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(7) == 2 and np.array_equal(inputs["pixel_values"], np.ones((1, 1, 2, 2, 3)))
        assert (ids[:2] == [7, 7]) == (parts[0] is None)


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    clip = tmp_path / "clip"
    config = tiny.clip_config(next(iter(tiny.CLIPS)))
    transformers.CLIPModel(config).save_pretrained(clip)
    tokenizer(False).save_pretrained(clip)
    capsys.readouterr()
    model, image = f"--model={folder}", f"--image={tmp_path}/a.png"
    for arguments, wanted in (
        ([], "--model is not given"),
        ([model], "--prompt is not given"),
        ([model, "--prompt=a", "--chat"], "--prompt and --chat exclude each other"),
        ([model, "--prompt=a", "b"], "unexpected argument 'b'"),
        ([model, "--prompt=a", "--tempature=1"], "Unknown command line flag 'tempature'"),
        ([model, "--prompt=a", "--image=no/where.png"], "image no/where.png: cannot be read"),
        ([model, "--prompt=a", f"--image={tmp_path}/no.png"], "no.png: not_an_image"),
        ([model, "--prompt=<image> or <image>", image], "the prompt has 2 <image> and 1 images were given"),
        ([model, "--prompt=a <image>"], "the prompt has 1 <image> and 0 images were given"),
        ([model, "--prompt=a", image], "Decoder reads text alone"),
        ([model, "--prompt="], "the prompt is empty"),
        ([model, "--prompt=" + "seal " * 300], "tokens, the model takes 256; shorten it"),
        ([model, "--chat"], "a conversation needs a template"),
        ([model, "--prompt=a", "--template=v9"], "'v9' is none of"),
        (
            [f"--model={tmp_path}/empty", "--prompt=a"],
            "neither a run (recipe.json) nor a Hugging Face folder",
        ),
        ([f"--model={clip}", "--prompt=a"], "Clip has no method `prepare`: it is no language model"),
        ([model, "--prompt=a", "--top_p=2", "--temperature=1"], "top_p is 2.0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            generate.FLAGS.unparse_flags()
            for name in generate.FLAGS:
                generate.FLAGS[name].unparse()
            generate.main(["generate", *arguments])
        err = capsys.readouterr().err
        assert stopped.value.code == 1, arguments
        assert err.startswith("error: ") and wanted in err and err.count("\n") == 1, err


def test_a_mistake_in_a_conversation_does_not_end_it(talker, capsys):
    lines = iter(["/image nowhere.png", "/imag a.png", "the seal"])

    def ask(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    generate.chat(parse(f"--model={talker}", "--chat", "--max_new_tokens=3"), ask)
    found = capsys.readouterr()
    assert "error: image nowhere.png: cannot be read" in found.err and len(found.out.splitlines()) >= 2
    assert "error: /imag is no command; there are /image FILE, /clear, /exit" in found.err


def test_templates_give_what_ends_an_answer(talker):
    for name, tokens, texts in (("v1", {2}, ()), ("chatml", {2, 4}, ()), ("v0", {2}, ("###",))):
        speaker = generate.open_speaker(parse(f"--model={talker}", "--prompt=x", f"--template={name}"))
        assert (set(speaker.ends), speaker.stops) == (tokens, texts)


def test_parameters_are_on_the_device(folder):
    speaker = generate.open_speaker(parse(f"--model={folder}", "--prompt=x"))
    assert all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in jax.tree.leaves(speaker.params))


@pytest.fixture(scope="module")
def blips(tmp_path_factory):
    """A Blip, a BlipVqa, and a picture."""
    folder = tmp_path_factory.mktemp("blip")
    whole = capfilt_models.blip(folder)
    model, params = hub.load(whole)
    asked = BlipVqa(model.config)
    fresh = asked.init(jax.random.key(0), **blip_tasks.example_inputs(asked))["params"]
    words, transform = hub.load_processor(whole)
    hub.save(
        asked,
        from_pretraining(asked, fresh, model, params),
        folder / "vqa",
        tokenizer=words,
        image_processor=transform,
    )
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(folder / "a.png")
    return whole, folder / "vqa", folder / "a.png"


@pytest.mark.parametrize("kind", [0, 1], ids=["caption", "answer"])
@pytest.mark.parametrize("prompt", ["a picture", ""])
def test_blip_writes_a_caption_or_an_answer(blips, kind, prompt, capsys):
    folder, picture = blips[kind], blips[2]
    given = [f"--model={folder}", f"--image={picture}", f"--prompt={prompt}", "--max_new_tokens=5"]
    if kind and not prompt:
        with pytest.raises(UserError, match="answers questions; give one as --prompt"):
            run(*given)
        return
    run(*given)
    model, params = hub.load(folder)
    words, transform = hub.load_processor(folder)
    pixels = transform.normalize(transform(np.asarray(Image.open(picture))))[None]
    ids = {"input_ids": np.array([words.encode(prompt)], np.int32)} if prompt else {}
    found = decode.generate(
        model, params, pixel_values=pixels, **ids, max_new_tokens=5, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    assert capsys.readouterr().out.strip() == words.decode(np.asarray(found[0])).strip()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt=a"], "0 images; BLIP looks at one, give --image once"),
        (
            ["--prompt=a", "--system=b", "--image=PICTURE"],
            "a Blip holds no conversation; leave out --chat, --system",
        ),
        (["--prompt=" + "a red star " * 20, "--image=PICTURE"], "tokens, the model takes 24; shorten it"),
    ],
)
def test_what_blip_cannot_be_asked(blips, more, message):
    more = [one.replace("PICTURE", str(blips[2])) for one in more]
    with pytest.raises(UserError, match=message):
        run(f"--model={blips[0]}", *more)
