"""What LlavaProcessor and LlavaForConditionalGeneration.generate read beside tokenizer and image processor."""

import json
from pathlib import Path
from typing import Any

from vlmjax.data import text
from vlmjax.data.conversation import MARK
from vlmjax.data.conversation_templates import OWN
from vlmjax.data.form import Form, ends_of
from vlmjax.data.pieces import Pieces
from vlmjax.errors import HubError
from vlmjax.models.vlm import VlmConfig

GENERATION = "generation_config.json"
_WORD_END = "</w>"


def check(config: VlmConfig, tokenizer: text.Tokenizer) -> None:
    """Raise HubError where the token that stands for images is not the model's."""
    found = tokenizer.token_id(MARK)
    if found != config.image_token_id:
        raise HubError(
            f"the tokenizer has {MARK} as id {found}, the model takes images at id {config.image_token_id}; it is "
            "another model's tokenizer (data.text.with_token adds the token where it is missing)"
        )


def settings(config: VlmConfig) -> dict[str, Any]:
    """Contents of processor_config.json."""
    full = config.keep_class or not config.image.class_token
    return {
        "processor_class": "LlavaProcessor",
        "image_token": MARK,
        "patch_size": config.image.patch_size,
        "num_additional_image_tokens": int(config.image.class_token),
        "vision_feature_select_strategy": "full" if full else "default",
    }


def write_generation(config: VlmConfig, tokenizer: text.Tokenizer, form: Form | None, path: Path) -> None:
    """Write what ends an answer: the model's own tokens and those of the form it was spoken to in."""
    pieces = Pieces(tokenizer)
    named = form is not None and (form.template != OWN or pieces.chat is not None)
    ends = ends_of(form.template, pieces)[0] if named else ()
    found = dict.fromkeys((*config.text.eos_token_ids, *ends))
    value = {
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": list(found) or None,
        "pad_token_id": pieces.pad_token_id,
    }
    value = {name: number for name, number in value.items() if number is not None}
    (path / GENERATION).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def leave_open(tokenizer: text.Tokenizer, path: Path) -> dict[str, Any] | None:
    """Rewrite the tokenizer.json of a tokenizer that closes every text, as CLIP's do, so that a prompt stays open.

    The processor gives prompts to the tokenizer whole. What is left is no tokenizer of CLIP's class, which would
    close texts again; so the blanks that its class makes of ends of words are made by the decoder.

    Returns:
        settings for tokenizer_config.json; None where a text is left open anyway.
    """
    backend = tokenizer.backend
    bare, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    if start is None or start + len(bare) == len(whole):
        return None
    from tokenizers import Regex, Tokenizer, decoders, processors

    opening = [(backend.id_to_token(one), one) for one in whole[:start]]
    again = Tokenizer.from_str(backend.to_str())
    again.post_processor = processors.TemplateProcessing(
        single=[token for token, _ in opening] + ["$A"], special_tokens=opening
    )
    if _WORD_END in "".join(backend.id_to_token(one) for one in bare):
        # The last blank goes by a pattern: the library's Strip ends the process where nothing is left of a text.
        blanks = [decoders.Replace(Regex(f"({_WORD_END})+$"), ""), decoders.Replace(_WORD_END, " ")]
        again.decoder = decoders.Sequence([again.decoder or decoders.Fuse(), *blanks])
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    again.save(str(path / "tokenizer.json"))
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    named = {f"{role}_token": backend.id_to_token(one) for role, one in roles.items() if one is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named}
