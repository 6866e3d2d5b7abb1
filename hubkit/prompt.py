"""Prompt templates: how an example becomes the tokens that a model reads and those it should write.

A template travels with each adapter (in `hubkit.json`), and training, composing, evaluating and serving all
encode through it, so an adapter is never asked in words that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hubkit.errors import UsageError
from hubkit.task import Example

KINDS = ("plain", "chat", "seq2seq")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: `prompt` is read, `target` (up to the end-of-sequence token) is scored."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """How an example is put to a model.

    `plain` formats `prompt` and `completion` by replacing `{input}` and `{output}`, nothing else;
    `chat` renders the tokenizer's own chat template with the input as the user's turn;
    `seq2seq` gives input and output as they are to an encoder-decoder.
    """

    kind: str = "plain"
    prompt: str = "{input}\nAnswer:"
    completion: str = " {output}"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"There is no prompt template of kind {self.kind!r}.", f"Use {', '.join(KINDS)}.")

    @classmethod
    def from_json(cls, data: dict[str, Any] | None) -> Template:
        """The template that `to_json` wrote; the default one for None. Unknown keys are ignored.

        Raises:
            UsageError: it is no JSON object, or of an unknown kind.
        """
        if data is not None and not isinstance(data, dict):
            raise UsageError(f"A prompt template is a JSON object, not {data!r}.", "Correct hubkit.json.")
        known = {k: str(v) for k, v in (data or {}).items() if k in cls.__dataclass_fields__}
        return cls(**known)

    def to_json(self) -> dict[str, str]:
        return asdict(self) if self.kind == "plain" else {"kind": self.kind}

    def encode(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Encoded:
        """Token ids of `example`, preceded by the solved `shots` in context.

        Raises:
            UsageError: the prompt has no tokens, or the tokenizer lacks what the template needs (an end of
                sequence, a chat template).
        """
        if tokenizer.eos_token_id is None:
            raise UsageError("The tokenizer has no end-of-sequence token.", "Set eos_token in its config.")
        if self.kind == "seq2seq":
            encoded = self._encode_seq2seq(tokenizer, example, shots)
        elif self.kind == "chat":
            encoded = self._encode_chat(tokenizer, example, shots)
        else:
            encoded = self._encode_plain(tokenizer, example, shots)
        if not encoded.prompt:  # the first target token would be predicted from nothing
            raise UsageError("An example's prompt has no tokens.", "Give the input or the template some text.")
        return encoded

    def _encode_plain(self, tokenizer: Any, example: Example, shots: Sequence[Example]) -> Encoded:
        solved = [self._prompt(shot) + self.completion.replace("{output}", shot.output) for shot in shots]
        prompt = self.separator.join([*solved, self._prompt(example)])
        completion = self.completion.replace("{output}", example.output)
        return Encoded(
            tuple(tokenizer(prompt).input_ids),
            (*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id),
        )

    def _prompt(self, example: Example) -> str:
        return self.prompt.replace("{input}", example.input)

    def _encode_chat(self, tokenizer: Any, example: Example, shots: Sequence[Example]) -> Encoded:
        if not tokenizer.chat_template:
            raise UsageError("The base has no chat template.", "Use the plain prompt template.")
        turns = []
        for shot in shots:
            turns += [{"role": "user", "content": shot.input}, {"role": "assistant", "content": shot.output}]
        turns.append({"role": "user", "content": example.input})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return Encoded(
            tuple(tokenizer(prompt, add_special_tokens=False).input_ids),
            (*tokenizer(example.output, add_special_tokens=False).input_ids, tokenizer.eos_token_id),
        )

    def _encode_seq2seq(self, tokenizer: Any, example: Example, shots: Sequence[Example]) -> Encoded:
        solved = [f"{shot.input} {shot.output}" for shot in shots]
        prompt = self.separator.join([*solved, example.input])
        # truncation to what the tokenizer states as the model's reach, as the reference LoraHub does
        return Encoded(
            tuple(tokenizer(prompt, truncation=True).input_ids),
            tuple(tokenizer(text_target=example.output, truncation=True).input_ids),
        )
