"""The words around the turns of a conversation: one table of templates, as the models' authors wrote them."""

from dataclasses import dataclass

from vlmjax.errors import DataError

OWN = "tokenizer"  # the name that stands for the tokenizer's own chat template
OPEN, CLOSE = (
    "<s>",
    "</s>",
)  # in a template: the opening and the closing token, whatever the tokenizer calls them
CONTROL = (OPEN, CLOSE, "<|im_start|>", "<|im_end|>")

_CURIOUS = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
_SAFE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """What stands between the turns. Names of CONTROL in these strings are single tokens, everything else is text.

    One round is `first_user` or `next_user`, the user's words, `ask`, `before_answer`, the answer, `stop`. The last
    three are what the model learns to write; a prompt ends with `ask`.

    Attributes:
        system: the system message of a conversation that has none; "" for no system message.
        before_system, after_system: around it, left out with it.
        system_inside: it stands inside the first user's turn, after `first_user`.
        user_is_text: False: the user's words are left out, only the images stay (LLaVA's first stage).
    """

    first_user: str
    next_user: str
    ask: str
    before_answer: str
    stop: str
    system: str = ""
    before_system: str = ""
    after_system: str = ""
    system_inside: bool = False
    user_is_text: bool = True


def _vicuna(curious: str) -> Template:
    """Two separators: a space after the user, the closing token after the answer (LLaVA's SeparatorStyle.TWO)."""
    return Template(
        "USER: ", "USER: ", " ASSISTANT:", " ", CLOSE, _CURIOUS.format(curious, curious), after_system=" "
    )


def _llama(next_user: str, system: str = "") -> Template:
    """Llama 2's form, in which the first user speaks the system message."""
    return Template(
        *("[INST] ", next_user, " [/INST]", " ", " " + CLOSE, system),
        before_system="<<SYS>>\n",
        after_system="\n<</SYS>>\n\n",
        system_inside=True,
    )


def _chatml(between: str, system: str) -> Template:
    """Roles between tokens of their own; `between` follows the token that ends a turn."""
    end, user = "<|im_end|>" + between, "<|im_start|>user\n"
    return Template(
        *(user, between + user, end + "<|im_start|>assistant\n", "", "<|im_end|>", system),
        before_system="<|im_start|>system\n",
        after_system=end,
    )


# LLaVA's llava/conversation.py, and for v0 the form of its training code (llava/train/train.py), without the two
# example rounds that v0 shows at inference.
TEMPLATES = {
    "v0": Template(
        *("### Human: ", " Human: ", "\n### Assistant:", " ", "\n###", _CURIOUS.format("human", "human")),
        after_system="\n\n",
    ),
    "v1": _vicuna("user"),
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "plain": Template("", "", "", "", "\n", user_is_text=False),
    "llama_2": _llama(OPEN + "[INST] "),
    "llava_llama_2": _llama(OPEN + "[INST] ", _SAFE),
    "mistral_instruct": _llama("[INST] "),
    "chatml": _chatml("\n", "You are a helpful assistant."),
    "chatml_direct": _chatml("", "Answer the questions."),
}


def template(name: str) -> Template:
    """The template of a name. Raises DataError for one that is not in the table."""
    if name not in TEMPLATES:
        raise DataError(
            f"conversation template {name!r} is none of {', '.join(TEMPLATES)}, or {OWN!r} for the tokenizer's own"
        )
    return TEMPLATES[name]
