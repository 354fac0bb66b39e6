"""A model and prompts -> the file of responses that `alignjax label --model` ranks."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignjax.cli import sampling
from alignjax.core.errors import UserError

if TYPE_CHECKING:
    from alignjax.data import Example, Source

CHUNK = 64  # prompts sampled at once
MAX_TURNS = 4  # in which what came twice, or came out empty, is sampled again


def sample_responses(args: argparse.Namespace, path: Path) -> None:
    """Writes responses to `path`, unless the same command did so before.

    Args:
      args: prompts, model, num_responses, chat, and what `sampling.add_arguments` adds.
      path: a .jsonl file of {"prompt", "responses", "sampled": how}, one for each prompt that got
        at least two responses that differ. It appears whole or not at all.
    Raises:
      UserError: if `path` holds something else; on prompts that are none or do not fit.
    """
    from alignjax.web.tasks import read_prompts

    names = ("model", "num_responses", "chat", "max_tokens", "temperature", "top_p", "top_k",
             "min_p", "repetition_penalty", "stop", "stop_sequence", "ban", "prefix", "int8_kv",
             "int8_weights", "seed")  # fmt: skip
    how = {name: getattr(args, name) for name in names}
    if path.suffix != ".jsonl":
        raise UserError(f"--responses {path}: expected a name that ends in .jsonl, with --model")
    examples, source = read_prompts(args.prompts)
    asked = [
        example.prompt if example.messages is None else example.messages for example in examples
    ]
    how["prompts"] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if path.exists():
        _check_same(path, how)
        return
    sampler = sampling.Sampler(args.model, args)
    ids = _encode(examples, source, sampler, args)
    max_tokens = sampler.max_tokens(max(map(len, ids)))
    part, written = path.with_name(path.name + ".part"), 0
    with part.open("w", encoding="utf-8") as file:
        for start in range(0, len(ids), CHUNK):
            chunk = slice(start, start + CHUNK)
            found = _distinct(sampler, ids[chunk], args.num_responses, max_tokens, start)
            for prompt, responses in zip(asked[chunk], found, strict=True):
                if len(responses) >= 2:
                    record = {"prompt": prompt, "responses": responses, "sampled": how}
                    print(json.dumps(record, ensure_ascii=False), file=file)
                    written += 1
            print(f"sampled {min(start + CHUNK, len(ids))} of {len(ids)} prompts", flush=True)
        file.flush()
        os.fsync(file.fileno())
    if not written:
        part.unlink()
        raise UserError(f"--model {args.model}: says the same to every prompt each time; raise "
                        "--temperature")  # fmt: skip
    os.replace(part, path)
    if written < len(ids):
        print(f"{len(ids) - written} prompts are left out: fewer than two responses that differ")


def _check_same(path: Path, how: dict[str, Any]) -> None:
    from alignjax.data import open_source

    before = open_source(str(path))[0].get("sampled")
    if before != how:
        changed = [n for n in how if not isinstance(before, dict) or before.get(n) != how[n]]
        raise UserError(
            f"--responses {path}: exists, and was sampled otherwise ({', '.join(changed)}); "
            "leave --model out to rank what it holds, or name another file"
        )


def _encode(
    examples: list[Example], source: Source, sampler: sampling.Sampler, args: argparse.Namespace
) -> list[Any]:
    from alignjax.data import Fields, TextConfig, prompt_encoder

    text = prompt_encoder(
        TextConfig(fields=Fields(prompt="prompt"), chat=args.chat), sampler.tokenizer
    )
    chat = prompt_encoder(TextConfig(fields=Fields(messages="messages")), sampler.tokenizer)
    room = sampler.context - (args.max_tokens or 1)
    found = []
    for i, example in enumerate(examples):
        try:
            ids = (text if example.messages is None else chat)(example)
            if len(ids) > room:
                raise UserError(
                    f"the prompt has {len(ids)} tokens; the model's context of {sampler.context} "
                    f"has room for {room} and the response; leave it out"
                )
        except UserError as error:
            raise UserError(f"{source.where(i)}: {error}") from error
        found.append(ids)
    return found


def _distinct(
    sampler: sampling.Sampler, ids: list[Any], num: int, max_tokens: int, start: int
) -> list[list[str]]:
    """Of each prompt up to `num` responses that differ and are not blank, in the order sampled."""
    found: list[dict[str, None]] = [{} for _ in ids]
    for turn in range(MAX_TURNS):
        short = [i for i, responses in enumerate(found) if len(responses) < num]
        if not short:
            break
        samples = sampler.sample(
            [ids[i] for i in short], num, max_tokens=max_tokens, turn=start * MAX_TURNS + turn
        )
        for place, sample in enumerate(samples):
            if sample.text.strip():
                found[short[place // num]][sample.text] = None
    return [list(responses)[:num] for responses in found]
