"""What to generate: options named as in transformers' GenerationConfig, checked once."""

import dataclasses
from collections.abc import Iterable, Sequence

from vlmjax.errors import UserError

EARLY = (False, True, "never")


@dataclasses.dataclass(frozen=True)
class Options:
    """How tokens are chosen and when a row ends. Everything here is compiled into the program.

    Attributes:
      num_beams: hypotheses kept per row; 1 is greedy, or sampling with `do_sample`.
      temperature, top_k, top_p: for `do_sample`, applied in this order; top_k 0 is no limit.
      repetition_penalty: divides positive and multiplies negative scores of tokens of the prompt and the answer
        (arXiv:1909.05858).
      length_penalty: with beams, a finished hypothesis scores sum of log-probabilities / length**length_penalty.
      early_stopping: with beams; see beams.py.
      min_new_tokens: before there are so many tokens none of eos_token_ids is chosen.
      eos_token_ids: a row ends after any of these.
      stop_sequences: a row ends after these tokens in a row. Tokens of the prompt do not count.
      pad_token_id: what follows the end of a row.
    """

    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    pad_token_id: int = 0

    def __post_init__(self):
        """Refuse what has no meaning."""
        for name, fits, wanted in (
            ("num_beams", self.num_beams >= 1, "1 or more"),
            (
                "temperature",
                self.temperature > 0,
                "above 0, or leave out do_sample to take the likeliest token",
            ),
            ("top_k", self.top_k >= 0, "0 for no limit, or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is none"),
            (
                "early_stopping",
                isinstance(self.early_stopping, (bool, str)) and self.early_stopping in EARLY,
                "False, True or 'never'",
            ),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or more"),
            ("stop_sequences", all(self.stop_sequences), "sequences of at least one token"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {wanted}")


def make_options(
    *,
    top_k: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    stop_sequences: Iterable[Sequence[int]] = (),
    **rest,
) -> Options:
    """Options from the arguments of `generate`. Raises UserError.

    Without a `pad_token_id` rows are padded with the first token that ends them, or with 0 where none does.
    """
    known = {field.name for field in dataclasses.fields(Options)} - {"eos_token_ids"}
    for name in rest:
        if name not in known:
            raise UserError(
                f"generation has no option {name!r}; it has {', '.join(sorted(known))}, eos_token_id"
            )
    given = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    ends = tuple(int(one) for one in given)
    if pad_token_id is None:
        pad_token_id = ends[0] if ends else 0
    stops = tuple(tuple(int(token) for token in sequence) for sequence in stop_sequences)
    return Options(
        top_k=top_k or 0, eos_token_ids=ends, pad_token_id=int(pad_token_id), stop_sequences=stops, **rest
    )
