"""Messages, or a prompt and its completion -> token ids and the mask of what is trained.

The ids of a prompt are always those that generation will see: the text up to where the assistant
begins is tokenised on its own, and so is what follows. Tokenising the whole and looking for the
boundary by offsets would differ wherever a token may span it (a newline that ends the prompt and
one that begins the answer); the model would then be trained on a prompt that it never gets.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2

from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.text.sandbox import Sandbox

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text, ...}."""

PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:\n{{ message.content or '' }}"
    "{{ eos_token if message.role == 'assistant' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""For models that come without a template: role, content, and EOS after the assistant's."""


class ChatTemplate:
    """A jinja2 chat template, rendered in a sandbox as transformers renders it."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None):
        """Compiles a template.

        Args:
          tokenizer: gives `bos_token`, `eos_token`, `pad_token` and the template that came with it.
          source: jinja2 text, instead of the tokenizer's own (or of `PLAIN_TEMPLATE`).
        Raises:
          UserError: on a syntax error, with its line.
        """
        self.source = source or getattr(tokenizer, "chat_template", None) or PLAIN_TEMPLATE
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        self._special = {
            f"{name}_token": "" if i is None else tokenizer.decode([i], skip_special=False)
            for name, i in ids.items()
        }
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # Python's compiler has limits of its own.
            raise UserError(f"chat template: {type(error).__name__}: {error}") from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Text of a conversation; `variables` (tools, enable_thinking, ...) reach the template.

        Raises:
          UserError: if the template refuses the messages, or fails on them in any way.
        """
        values = {**self._special, **variables, "add_generation_prompt": add_generation_prompt}
        self._sandbox.start()
        try:
            return self._template.render(messages=list(messages), **values)
        except Exception as error:  # A template is a program, with all that can go wrong in one.
            roles = " ".join(str(message.get("role")) for message in messages)
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise UserError(f"chat template: {kind}{error} (roles: {roles})") from error


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    train_on: Literal["all", "last"] = "all",
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the assistant is trained to say.

    An assistant turn begins where the template's generation prompt ends and is trained up to its
    last special token (the one that ends the turn: EOS, `<|im_end|>`, ...), that one included; the
    newline that a template writes after it is not. BOS is the template's business: none is added.

    Some templates write an earlier turn otherwise once another follows (Qwen3 takes the thinking
    out of it). What would then be trained is not what the model says at that point, so with
    `train_on="all"` this is an error; `"last"` trains the last assistant turn only. To train every
    turn of such a template, take a sequence for each: `turns`, with `train_on="last"`.

    Args:
      tokenizer: whose ids are returned.
      template: of the same tokenizer.
      messages: with at least one of the assistant's.
      train_on: all turns of the assistant, or the last.
      variables: for the template, such as `tools`.
    Returns:
      ids, and a mask of the same length, True where the token is a target.
    Raises:
      UserError: if no turn is the assistant's, the template writes a turn otherwise depending on
        what follows, or ends it with no special token.
    """
    trained = turns(messages)
    if train_on == "last":
        trained = trained[-1:]
    text = template.render(messages, **variables)
    starts = []
    for i in trained:
        before = template.render(messages[:i], add_generation_prompt=True, **variables)
        if not text.startswith(before):
            why = "the generation prompt is no prefix of the conversation"
            raise _unstable(i, why, i + 1 < len(messages), variables)
        starts.append(len(before))

    ids = tokenizer.encode(text[: starts[0]])
    mask = [False] * len(ids)
    for i, start, stop in zip(trained, starts, [*starts[1:], len(text)], strict=True):
        segment = tokenizer.encode(text[start:stop], ids)
        alone = tokenizer.encode(template.render(messages[: i + 1], **variables)[start:], ids)
        shared = _shared(segment, alone)
        if tokenizer.decode(alone[shared:]).strip():
            why = "the turn reads otherwise once another follows"
            raise _unstable(i, why, i + 1 < len(messages), variables)
        num_trained = _turn_length(tokenizer, segment[:shared], i)
        ids += segment
        mask += [True] * num_trained + [False] * (len(segment) - num_trained)
    _check_bos(tokenizer, ids)
    return ids, mask


def turns(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's messages. Raises UserError if there are none."""
    found = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not found:
        raise UserError("a conversation without an assistant message has nothing to train on")
    return found


def encode_chat_prompt(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], **variables: Any
) -> list[int]:
    """Ids of a conversation up to where the assistant is to go on."""
    ids = tokenizer.encode(template.render(messages, add_generation_prompt=True, **variables))
    _check_bos(tokenizer, ids)
    return ids


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, add_bos: bool = True) -> list[int]:
    """Ids of plain text to go on from, after BOS where the tokenizer has one."""
    ids = tokenizer.encode(prompt)
    if add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    _check_bos(tokenizer, ids)
    return ids


def encode_prompt_completion(
    tokenizer: Tokenizer,
    prompt: str,
    completion: str,
    *,
    add_bos: bool = True,
    add_eos: bool = True,
) -> tuple[list[int], list[bool]]:
    """Ids of plain text, and the mask of the completion with the EOS that ends it.

    Args:
      tokenizer: whose ids are returned.
      prompt: not trained; "" trains all of a document.
      completion: trained.
      add_bos: begin with BOS if the tokenizer has one and the prompt does not begin with it.
      add_eos: end with EOS if the completion does not.
    Returns:
      ids, and a mask of the same length. The first token is never a target: nothing predicts it.
    """
    before = encode_prompt(tokenizer, prompt, add_bos=add_bos)
    after = tokenizer.encode(completion, tokenizer.encode(prompt))  # A BOS of ours starts no text.
    if before == after[:1] == [tokenizer.bos_id]:
        after = after[1:]
    if add_eos and after[-1:] != [tokenizer.eos_id]:
        after = [*after, tokenizer.eos_id]
    mask = [False] * len(before) + [True] * len(after)
    return before + after, [False, *mask[1:]] if mask else []


def _shared(ids: Sequence[int], alone: Sequence[int]) -> int:
    """Tokens that a turn has at its start whether another follows (`ids`) or none does (`alone`).

    After its end the two may differ, but in special tokens and white space only: some templates
    close a conversation with one more EOS.
    """
    pairs = zip(ids, alone, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _turn_length(tokenizer: Tokenizer, ids: list[int], turn: int) -> int:
    """Tokens of the assistant's turn, its last special token included; only space may follow it."""
    for length in range(len(ids), 0, -1):
        if is_special(tokenizer, ids[length - 1]):
            if tokenizer.decode(ids[length:]).strip():
                break  # Such as <think> in the midst of it.
            return length
    raise UserError(
        f"messages[{turn}]: the chat template ends the assistant's turn with no special token, "
        "so the model would never learn to stop; let the template write eos_token after it"
    )


def is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Whether `decode` leaves the token out, or it is EOS."""
    if token == tokenizer.eos_id:
        return True
    return not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special=False))


def _unstable(turn: int, why: str, has_more: bool, variables: Mapping[str, Any]) -> UserError:
    remedies = []
    if variables:
        # Such as enable_thinking: false: its prompt has closed the thought that a turn begins with.
        remedies.append(
            f"leave out template_variables ({', '.join(variables)}) that do not fit these messages"
        )
    if has_more:
        remedies.append('train each turn as a sequence of its own (train_on="each")')
        remedies.append('the last turn only (train_on="last")')
    remedies.append("take another chat_template, one that writes a turn as the model says it")
    what = "train every turn at once" if has_more else "train this turn"
    return UserError(
        f"messages[{turn}]: {why}, so this template cannot {what}; {', or '.join(remedies)}"
    )


def _check_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    if tokenizer.bos_id is not None and tokenizer.bos_id != tokenizer.eos_id:
        start = [tokenizer.bos_id] * 2
        if list(ids[:2]) == start:
            raise UserError("the text begins with two BOS; take one out of the data or template")
