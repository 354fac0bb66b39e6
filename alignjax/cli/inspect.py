"""`alignjax inspect CONFIG [key=value ...]`: a batch of the data, with what is trained on."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from alignjax.phases.corpus import CorpusConfig
    from alignjax.phases.grpo_config import RlConfig
    from alignjax.text import HFTokenizer

EXAMPLES = """\
examples:
  alignjax inspect configs/phases/sft.yaml
  alignjax inspect chat.yaml data.text.train_on=last --rows 2
  alignjax inspect chat.yaml --batch 3 --tokens | less
  alignjax inspect configs/recipes/gsm8k_laptop.yaml --stage grpo

For phases sft and distill it prints rows of the batch, document by document: what is trained is
coloured, or between brackets where there is no colour (NO_COLOR, a pipe). For phases grpo and ppo
it prints the prompts as the model gets them. No model is loaded. The data of a recipe's stage are
there once the stages before it have run.
"""

TRAINED, GIVEN, SPECIAL = "bold green", "", "magenta"
"""Styles; a special token that is trained has both."""


class Span(NamedTuple):
    """Tokens that stand together in a document and are shown alike."""

    text: str
    is_trained: bool
    is_special: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one of ours")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")
    parser.add_argument("--stage", metavar="NAME", help="which stage, where CONFIG is a recipe")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="the Nth of training (default: 1)"
    )
    parser.add_argument(
        "--rows", type=int, default=4, metavar="N",
        help="rows or prompts to print; 0 prints the counts alone (default: 4)",
    )  # fmt: skip
    parser.add_argument("--tokens", action="store_true", help="each token by itself, with its id")


def main(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError

    for name, least in (("batch", 1), ("rows", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    from rich.console import Console

    from alignjax.cli.run import check
    from alignjax.core.config import find_config, load
    from alignjax.phases.corpus import CorpusConfig
    from alignjax.phases.grpo_config import RlConfig
    from alignjax.text import load_tokenizer

    config: Any = _stage(check(load(find_config(args.config), args.overrides)), args.stage)
    if not isinstance(config, CorpusConfig | RlConfig):
        raise UserError(
            f"phase: {config.phase}: inspect shows the data of phase sft, distill, grpo or ppo"
        )
    tokenizer = load_tokenizer(config.tokenizer_source())
    view = View(Console(highlight=False, soft_wrap=True), tokenizer, args.tokens)
    if isinstance(config, CorpusConfig):
        _show_rows(view, config, args.batch, args.rows)
    else:
        _show_prompts(view, config, args.batch, args.rows)


def _stage(config: Any, name: str | None) -> Any:
    """The phase to look at: the config itself, or one of a recipe's stages."""
    from alignjax.core.errors import UserError

    stages = getattr(config, "stages", None)
    if stages is None:
        if name is not None:
            raise UserError(f"--stage {name}: this config is one phase, without stages")
        return config
    shown = ("sft", "distill", "grpo", "ppo")
    there = [key for key, stage in stages.items() if stage.phase in shown]
    if name is None and len(there) == 1:
        name = there[0]
    if name not in there:
        came = "this is a recipe" if name is None else f"--stage {name}"
        raise UserError(f"{came}: expected --stage with one of {', '.join(there) or 'none'}")
    return stages[name]


class View:
    """Prints documents of token ids. Text of the data is shown, never obeyed: no escape codes."""

    def __init__(self, console: Console, tokenizer: HFTokenizer, by_token: bool):
        self._console, self.tokenizer, self._by_token = console, tokenizer, by_token
        has_colour = console.color_system is not None and not console.no_color
        can_draw = "utf" in console.encoding.lower()
        self._brackets = ("", "") if has_colour else ("⟦", "⟧") if can_draw else ("[[", "]]")
        self._rule, self._return = ("──", "↵") if can_draw else ("--", "\\n")

    def say(self, line: str, style: str | None = None) -> None:
        self._console.print(self._written(line), style=style, markup=False)

    def head(self, line: str) -> None:
        self.say(f"{self._rule} {line}", style="cyan")

    def legend(self) -> None:
        opening, closing = self._brackets
        how = f"between {opening} and {closing}" if opening else "bold green"
        self.say(f"What is trained on is {how}.")

    def document(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Prints ids [length], of which those in the mask are trained."""
        from rich.text import Text

        opening, closing = self._brackets
        shown = Text()
        spans = list(self._spans(ids.tolist(), mask.tolist()))
        width = 0
        for n, span in enumerate(spans):
            style = _style(span)
            is_first = n == 0 or not spans[n - 1].is_trained
            is_last = n + 1 == len(spans) or not spans[n + 1].is_trained
            if self._by_token:
                cell = self._written(
                    f"{opening}{span.text}{closing}" if span.is_trained else span.text
                )
                if width and width + len(cell) > self._console.width:
                    shown.append("\n")
                    width = 0
                shown.append(cell, style).append("  ")
                width += len(cell) + 2
                continue
            if span.is_trained and is_first:
                shown.append(opening, style)
            self._append(shown, span.text, style)
            if span.is_trained and is_last:
                shown.append(closing, style)
        if shown.plain.endswith("\n"):
            shown.right_crop(1)
        self._console.print(shown)

    def _append(self, shown: Text, text: str, style: str) -> None:
        """A line feed is seen and obeyed; other signs that cannot be seen are only seen."""
        for n, line in enumerate(text.split("\n")):
            if n:
                shown.append(self._return, f"{style} dim".strip()).append("\n")
            shown.append(self._written("".join(map(_visible, line))), style)

    def _written(self, text: str) -> str:
        """What the output's encoding cannot express is spelled out."""
        encoding = self._console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _spans(self, ids: list[int], mask: list[bool]) -> Iterator[Span]:
        from alignjax.text import is_special

        def kind(n: int) -> tuple[bool, bool]:
            return mask[n], is_special(self.tokenizer, ids[n])

        def text(start: int, stop: int) -> str:
            return self.tokenizer.decode(
                ids[start:stop], skip_special=False, after=ids[max(0, start - 1) : start]
            )

        if self._by_token:
            for n, i in enumerate(ids):
                yield Span(f"{text(n, n + 1)!r}:{i}", *kind(n))
            return
        for alike, run in itertools.groupby(range(len(ids)), kind):
            places = list(run)
            yield Span(text(places[0], places[-1] + 1), *alike)


def _style(span: Span) -> str:
    if span.is_special:
        return f"{SPECIAL} bold reverse" if span.is_trained else SPECIAL
    return TRAINED if span.is_trained else GIVEN


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def _nth(batches: Iterator[Any], n: int) -> Any:
    from alignjax.core.errors import UserError

    batch = next(itertools.islice(batches, n - 1, None), None)
    if batch is None:
        raise UserError(f"--batch {n}: the data end before it")
    return batch


def _show_rows(view: View, config: CorpusConfig, number: int, num_rows: int) -> None:
    from alignjax.data import sequence_encoder, training_source
    from alignjax.phases.corpus import text_rows

    source = training_source(config.data.train, config.data.text)
    encode = sequence_encoder(config.data.text, view.tokenizer)
    batches = text_rows(config, source, encode, rows=config.data.rows)
    batch = _nth(batches, number)
    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in batch.items()}
    segments, mask = rows["segment_ids"], rows["mask"]
    num_documents = segments.max(1)
    shape = f"{len(segments)} rows of {segments.shape[1]} tokens"
    view.say(
        f"Batch {number}: {shape}, "
        f"{_share((segments > 0).sum(), segments.size, 'text')}, "
        f"{_share((segments == 0).sum(), segments.size, 'padding')}"
    )
    view.say(f"Trained: {_share(mask.sum(), (segments > 0).sum(), 'of the text')}")
    view.say(
        f"Documents: {num_documents.sum():,}, {num_documents.min()} to {num_documents.max()} in a "
        f"row; of {len(source):,} in all, {batches.num_dropped:,} dropped so far as too long"
    )
    view.legend()
    for n in range(min(num_rows, len(segments))):
        length = int((segments[n] > 0).sum())
        view.say("")
        count = "1 document" if num_documents[n] == 1 else f"{num_documents[n]} documents"
        view.head(
            f"row {n + 1}: {count}, {length} tokens, {mask[n].sum()} trained, "
            f"{segments.shape[1] - length} padding"
        )
        for segment in range(1, num_documents[n] + 1):
            places = segments[n] == segment
            trained = mask[n][places]
            view.head(f"document {segment}: {places.sum()} tokens, {trained.sum()} trained")
            view.document(rows["tokens"][n][places], trained)


def _show_prompts(view: View, config: RlConfig, number: int, num_rows: int) -> None:
    import numpy as np

    from alignjax.data import Examples, examples, open_source, prompt_encoder

    rollout, text = config.rollout, config.data.text
    source = Examples(open_source(config.data.train), text.fields)
    batches = examples(
        source,
        prompt_encoder(text, view.tokenizer),
        num_prompts=rollout.num_prompts,
        prompt_len=rollout.max_prompt_tokens,
        overlong=config.data.overlong,
        seed=config.seed,
    )
    prompts = _nth(batches, number)
    lengths = [len(prompt.tokens) for prompt in prompts]
    view.say(
        f"Batch {number}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens "
        f"(at most {rollout.max_prompt_tokens}), {rollout.group_size} completions of each"
    )
    view.say(f"Of {len(source):,} records, {batches.num_dropped:,} dropped so far as too long")
    for n, prompt in enumerate(prompts[:num_rows], start=1):
        view.say("")
        view.head(f"prompt {n}: {len(prompt.tokens)} tokens")
        view.document(prompt.tokens, np.zeros(len(prompt.tokens), bool))
        view.head(f"reference: {prompt.example.reference!r}; fields: {_fields(prompt.example)}")


def _fields(example: Any) -> str:
    return ", ".join(example.fields) or "none"


def _share(part: Any, whole: Any, what: str) -> str:
    return f"{int(part):,} tokens ({100 * int(part) / max(int(whole), 1):.1f}%) {what}"
