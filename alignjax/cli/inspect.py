"""`alignjax inspect CONFIG [key=value ...]`: a batch of the data, with what is trained on."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignjax.cli.token_view import View
    from alignjax.phases.corpus import CorpusConfig
    from alignjax.phases.grpo_config import RlConfig
    from alignjax.phases.preference_config import PreferenceConfig
    from alignjax.phases.reward_config import RewardPhaseConfig

EXAMPLES = """\
examples:
  alignjax inspect configs/phases/sft.yaml
  alignjax inspect chat.yaml data.text.train_on=last --rows 2
  alignjax inspect chat.yaml --batch 3 --tokens | less
  alignjax inspect configs/recipes/gsm8k_laptop.yaml --stage grpo

For phases sft and distill it prints rows of the batch, document by document: what is trained is
coloured, or between brackets where there is no colour (NO_COLOR, a pipe). For phases reward and
preference it prints comparisons: a prompt, then its responses with their ranks. For phases grpo,
ppo, online_preference and online_distill it prints the prompts as the model gets them. No model is
loaded. The data of a recipe's stage are there once the stages before it have run.
"""

SHOWN = (
    "sft", "distill", "reward", "preference", "grpo", "ppo", "online_preference", "online_distill",
)  # fmt: skip


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
        help="rows, comparisons or prompts to print; 0 prints the counts alone (default: 4)",
    )  # fmt: skip
    parser.add_argument("--tokens", action="store_true", help="each token by itself, with its id")


def main(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError

    for name, least in (("batch", 1), ("rows", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {least}")
    from rich.console import Console

    from alignjax.cli.run import check
    from alignjax.cli.token_view import View
    from alignjax.core.config import find_config, load
    from alignjax.phases.corpus import CorpusConfig
    from alignjax.phases.preference_config import PreferenceConfig
    from alignjax.phases.reward_config import RewardPhaseConfig
    from alignjax.text import load_tokenizer

    config: Any = _stage(check(load(find_config(args.config), args.overrides)), args.stage)
    if config.phase not in SHOWN:
        raise UserError(
            f"phase: {config.phase}: inspect shows the data of the phases {', '.join(SHOWN)}"
        )
    tokenizer = load_tokenizer(config.tokenizer_source())
    view = View(Console(highlight=False, soft_wrap=True), tokenizer, args.tokens)
    if isinstance(config, CorpusConfig):
        _show_rows(view, config, args.batch, args.rows)
    elif isinstance(config, RewardPhaseConfig | PreferenceConfig):
        _show_comparisons(view, config, args.batch, args.rows)
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
    there = [key for key, stage in stages.items() if stage.phase in SHOWN]
    if name is None and len(there) == 1:
        name = there[0]
    if name not in there:
        came = "this is a recipe" if name is None else f"--stage {name}"
        raise UserError(f"{came}: expected --stage with one of {', '.join(there) or 'none'}")
    return stages[name]


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
        view.head(
            f"row {n + 1}: {_count(num_documents[n], 'document')}, {length} tokens, "
            f"{mask[n].sum()} trained, {segments.shape[1] - length} padding"
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


def _show_comparisons(
    view: View, config: RewardPhaseConfig | PreferenceConfig, number: int, num_shown: int
) -> None:
    import numpy as np

    from alignjax.data import comparison_encoder, comparison_rows

    data = config.data
    preferences = data.open(data.train)
    source = config.view(preferences)
    encode = comparison_encoder(data.text, view.tokenizer)
    batches = comparison_rows(
        source, encode,
        num_prompts=data.num_prompts, num_micro_batches=1, row_len=data.row_len,
        num_responses=source.num_responses, shared_prompt=data.shared_prompt, packed=data.packed,
        overlong=data.overlong, seed=config.seed,
    )  # fmt: skip
    batch = _nth(batches, number)
    places = [int(index) for index in batch["index"].ravel() if index >= 0]
    num_text = (batch["segment_ids"] > 0).sum()
    num_rows = int((batch["segment_ids"] > 0).any(-1).sum())
    view.say(
        f"Batch {number}: {_count(len(places), 'comparison')}, {_count(num_rows, 'row')} of "
        f"{data.row_len} tokens, "
        f"{_share(num_text, num_rows * data.row_len, 'text')}"
    )
    view.say(
        f"Of {len(source):,} comparisons of {len(preferences):,} records, {batches.num_dropped:,} "
        f"dropped so far as too long; {source.num_left_out:,} records say nothing of the kind, "
        f"{preferences.num_faulty:,} are faulty"
    )
    view.legend()
    for n, place in enumerate(places[:num_shown], start=1):
        element = encode(source[place])
        view.say("")
        view.head(f"comparison {n}: {source.where(place)}")
        view.head(f"prompt: {len(element.prompt)} tokens")
        view.document(element.prompt, np.zeros(len(element.prompt), bool))
        for ids, rank in zip(element.completions, element.ranks, strict=True):
            label = {None: f"rank {rank}", True: "good", False: "bad"}[element.label]
            view.head(f"{label}: {len(ids)} tokens")
            view.document(ids, np.ones(len(ids), bool))


def _fields(example: Any) -> str:
    return ", ".join(example.fields) or "none"


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _share(part: Any, whole: Any, what: str) -> str:
    return f"{int(part):,} tokens ({100 * int(part) / max(int(whole), 1):.1f}%) {what}"
